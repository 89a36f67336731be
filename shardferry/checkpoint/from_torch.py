"""Turn torch's own in-memory ``Metadata``, as a storage reader returns it, into a catalog.

Only the reader knows where its items are. The catalog, in which one file holds all, serves to find keys and to prove cover.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from shardferry.checkpoint.build import saved_tensors
from shardferry.checkpoint.catalog import Catalog, SavedObject, ZipItem
from shardferry.errors import CatalogError

_STORAGE = "the reader's storage"


def catalog_from_torch(metadata: Metadata, *, location: str, keys: Collection[str] | None = None) -> Catalog:
    """The catalog of a checkpoint whose metadata was read by torch's or anybody's code.

    Args:
        location: the checkpoint's name in error messages.
        keys: the only keys to convert; None: all.

    Raises:
        CatalogError: a chunk has not as many dimensions as its tensor.
    """
    saved = {key: value for key, value in metadata.state_dict_metadata.items() if keys is None or key in keys}
    tensors = {key: value for key, value in saved.items() if isinstance(value, TensorStorageMetadata)}
    offsets, sizes = _boxes(tensors, location)
    counts = [len(tensor.chunks) for tensor in tensors.values()]
    shapes = [tuple(tensor.size) for tensor in tensors.values()]
    dtypes = [tensor.properties.dtype for tensor in tensors.values()]
    num_chunks, paths = sum(counts), None
    if isinstance(metadata.planner_data, Mapping):  # as torch's planners leave it; another one may leave something else
        recorded = metadata.planner_data.items()
        paths = {key: tuple(path) for key, path in recorded if isinstance(path, tuple | list) and path}
    return Catalog(
        location=location,
        torch_metadata_version=str(metadata.version),
        files=(_STORAGE,),
        tensors=saved_tensors(tensors, shapes, dtypes, counts),
        objects={key: SavedObject(key, 0, 0, 0, ZipItem()) for key in saved if key not in tensors},
        paths=paths,
        chunk_file=np.zeros(num_chunks, dtype=np.int32),
        chunk_byte_offset=np.zeros(num_chunks, dtype=np.int64),
        chunk_byte_length=np.zeros(num_chunks, dtype=np.int64),
        box_offsets=offsets,
        box_sizes=sizes,
        chunk_format=np.zeros(num_chunks, dtype=np.int16),
        formats=(ZipItem(),),
    )


def _boxes(tensors: Mapping[str, TensorStorageMetadata], location: str) -> tuple[np.ndarray, np.ndarray]:
    offsets: list[int] = []
    sizes: list[int] = []
    for key, tensor in tensors.items():
        for chunk in tensor.chunks:
            if not len(chunk.offsets) == len(chunk.sizes) == len(tensor.size):
                raise CatalogError(
                    f"{location}: {key}: chunk at {tuple(chunk.offsets)} of sizes {tuple(chunk.sizes)} in a tensor of the "
                    f"shape {tuple(tensor.size)}"
                )
            offsets += chunk.offsets
            sizes += chunk.sizes
    return np.array(offsets, dtype=np.int64), np.array(sizes, dtype=np.int64)
