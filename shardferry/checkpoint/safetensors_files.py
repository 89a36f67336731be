"""Turn safetensors files into what a catalog is made of; two of torch's writers leave such files.

* ``HuggingFaceStorageWriter``, like everything else of Hugging Face, leaves no ``.metadata``: the headers of all files
  together say what is there (`read_safetensors`).
* ``FileSystemWriter`` with ``SerializationFormat.SAFETENSORS`` leaves a ``.metadata`` whose byte positions are wrong, and
  files that are whole only where they hold nothing but tensors (`with_safetensors_positions`).
"""

from __future__ import annotations

import dataclasses
import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from shardferry.checkpoint.catalog import NO_FILE, Catalog, SavedTensor
from shardferry.checkpoint.item_format import RawItem, ZipItem
from shardferry.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageInfo,
    TensorProperties,
    TensorStorageMetadata,
)
from shardferry.checkpoint.safetensors import RawTensor, read_header
from shardferry.errors import CatalogError
from shardferry.storage.base import RangeReader, read_file

SUFFIX = ".safetensors"
INDEX_FILE = "model.safetensors.index.json"  # which file holds which tensor; not every writer leaves one
SINGLE_FILE = "model.safetensors"  # what a model of one file is called

_HEADERS_AT_ONCE = 16


def is_safetensors(names: Iterable[str]) -> bool:
    """Whether files of these names are a checkpoint of safetensors files, as far as names tell."""
    return any(name.endswith(SUFFIX) for name in names)


def read_safetensors(storage: RangeReader, names: Sequence[str]) -> Metadata:
    """What all safetensors files of a directory hold together. The whole tensor ends where its last shard ends.

    Raises:
        StorageError: a file that the index names is missing.
        CatalogError: a file is damaged, or two files contradict each other.
    """
    paths = _paths(storage, names)
    with ThreadPoolExecutor(_HEADERS_AT_ONCE, thread_name_prefix="shardferry-headers") as pool:
        headers = list(pool.map(lambda path: read_header(storage, path), paths))
    shards: dict[str, dict[tuple[int, ...], RawTensor]] = {}
    for tensor in (tensor for header in headers for tensor in header):
        others = shards.setdefault(tensor.key, {})
        if (other := others.setdefault(tensor.offsets, tensor)) is not tensor:
            raise CatalogError(
                f"{storage.location}: {tensor.key}: {other.path} and {tensor.path} both hold it from {tensor.offsets} on; which "
                "one is right can't be known. Remove the one that is not of this checkpoint."
            )
    return _metadata({key: list(boxes.values()) for key, boxes in shards.items()}, storage.location)


def _paths(storage: RangeReader, names: Sequence[str]) -> list[str]:
    """The files that the index names, else all: next to a model's files there may be the same weights once more."""
    if INDEX_FILE not in names:
        return [name for name in names if name.endswith(SUFFIX)]
    try:
        paths = json.loads(read_file(storage, INDEX_FILE))["weight_map"].values()
        return sorted(set(map(str, paths)))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CatalogError(f"{storage.location}/{INDEX_FILE}: is damaged ({type(error).__name__}: {error})") from error


def _metadata(shards: Mapping[str, Sequence[RawTensor]], location: str) -> Metadata:
    metadata = Metadata()
    metadata.state_dict_metadata = {key: _tensor_metadata(boxes, location) for key, boxes in shards.items()}
    metadata.storage_data = {_index(box): _storage_info(box) for boxes in shards.values() for box in boxes}
    metadata.version = "safetensors"
    return metadata


def _tensor_metadata(boxes: Sequence[RawTensor], location: str) -> TensorStorageMetadata:
    first = boxes[0]
    for other in boxes:
        if (other.dtype, len(other.sizes)) != (first.dtype, len(first.sizes)):
            raise CatalogError(
                f"{location}: {first.key}: is {first.dtype} of shape {first.sizes} in {first.path}, "
                f"{other.dtype} of shape {other.sizes} in {other.path}"
            )
    tensor = TensorStorageMetadata()
    tensor.properties = TensorProperties()
    tensor.properties.dtype = first.dtype
    ends = [tuple(o + s for o, s in zip(box.offsets, box.sizes, strict=True)) for box in boxes]
    tensor.size = tuple(map(max, *ends)) if len(ends) > 1 else ends[0]
    tensor.chunks = [_chunk(box) for box in boxes]
    return tensor


def _chunk(box: RawTensor) -> ChunkStorageMetadata:
    return ChunkStorageMetadata([{"offsets": box.offsets, "sizes": box.sizes}])


def _index(box: RawTensor) -> MetadataIndex:
    return MetadataIndex([{"fqn": box.key, "offset": box.offsets}])


def _storage_info(box: RawTensor) -> StorageInfo:
    return StorageInfo([{"relative_path": box.path, "offset": box.byte_offset, "length": box.nbytes, "is_raw": True}])


def with_safetensors_positions(catalog: Catalog, storage: RangeReader) -> Catalog:
    """The catalog with the byte positions of those tensors that lie in safetensors files taken from these files.

    Such a file is known by the metadata: it gives a tensor's item exactly the bytes of its elements, and a zip has more.

    Raises:
        StorageError: a file is missing.
        CatalogError: a file also holds Python objects, or lacks a tensor: both happen when torch writes this format.
    """
    tensors = _TensorOfChunk(catalog)
    files = [file for file, chunk in _first_chunks(catalog) if _is_bare(catalog, tensors[chunk], chunk)]
    if not files:
        return catalog
    byte_offset, chunk_format = catalog.chunk_byte_offset.copy(), catalog.chunk_format.copy()
    for file in files:
        chunks = np.flatnonzero(catalog.chunk_file == file).tolist()
        for chunk, tensor in _located(catalog, tensors, chunks, catalog.files[file], storage):
            byte_offset[chunk], chunk_format[chunk] = tensor.byte_offset, len(catalog.formats)
    return dataclasses.replace(
        catalog, chunk_byte_offset=byte_offset, chunk_format=chunk_format, formats=(*catalog.formats, RawItem())
    )


class _TensorOfChunk:
    """Which tensor a chunk (a row of the catalog) is of."""

    def __init__(self, catalog: Catalog) -> None:
        self._tensors = list(catalog.tensors.values())
        self._starts = [tensor.chunks.start for tensor in self._tensors]

    def __getitem__(self, chunk: int) -> SavedTensor:
        return self._tensors[bisect_right(self._starts, chunk) - 1]


def _first_chunks(catalog: Catalog) -> Iterable[tuple[int, int]]:
    """One chunk of each file that holds any: a writer writes all of a file in one format."""
    files, chunks = np.unique(catalog.chunk_file, return_index=True)
    return [(file, chunk) for file, chunk in zip(files.tolist(), chunks.tolist(), strict=True) if file != NO_FILE]


def _is_bare(catalog: Catalog, saved: SavedTensor, chunk: int) -> bool:
    if not isinstance(catalog.formats[catalog.chunk_format[chunk]], ZipItem):
        return False
    return int(catalog.chunk_byte_length[chunk]) == catalog.region(saved, chunk).numel * saved.dtype.itemsize


def _located(
    catalog: Catalog, tensors: _TensorOfChunk, chunks: Sequence[int], path: str, storage: RangeReader
) -> list[tuple[int, RawTensor]]:
    first = tensors[chunks[0]].key
    try:
        header = {tensor.key: tensor for tensor in read_header(storage, path)}
    except CatalogError as error:
        raise _unusable(
            first, f"{error}. Torch writes Python objects and tensors over each other in this format"
        ) from error
    located = []
    for chunk in chunks:
        saved = tensors[chunk]
        region, tensor = catalog.region(saved, chunk), header.get(saved.key)
        wanted = (saved.dtype, region.offsets, region.sizes)
        if tensor is None or (tensor.dtype, tensor.offsets, tensor.sizes) != wanted:
            raise _unusable(saved.key, f"{storage.location}/{path} holds {_what(tensor)}, not {_words(*wanted)}")
        located.append((chunk, tensor))
    return located


def _what(tensor: RawTensor | None) -> str:
    return "no such tensor" if tensor is None else _words(tensor.dtype, tensor.offsets, tensor.sizes)


def _words(dtype: torch.dtype, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> str:
    return f"{dtype} of shape {sizes} from {offsets} on"


def _unusable(key: str, what: str) -> CatalogError:
    return CatalogError(
        f"{key}: was saved with SerializationFormat.SAFETENSORS, which keeps only tensors and one shard of each in a file: "
        f"{what}. Save again with FileSystemWriter's default format, or with HuggingFaceStorageWriter."
    )
