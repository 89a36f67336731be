"""Keep catalogs in a directory, keyed by the digest of their metadata, so that large metadata is unpickled once.

A file is never a pickle. It begins with a digest of all that follows, which is checked before anything is used::

    |magic: 8 bytes|SHA-256 of the rest: 32|bytes of the JSON: 8|JSON|column|column|...

What a storage tells of its files (sizes, versions) and the storage options are not kept: they are asked for at each opening.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shardferry.checkpoint.build import name_inside, saved_tensors
from shardferry.checkpoint.catalog import Catalog, ItemFormat, RawItem, SavedObject, TransformedItem, ZipItem

logger = logging.getLogger(__name__)

# To be changed whenever the bytes change, or the catalog that is built from the same metadata.
_MAGIC = b"SHFYCAT2"
# Wide integers first: after a JSON of a multiple of 8 bytes each column is aligned.
_COLUMNS = {
    "chunk_byte_offset": "<i8",
    "chunk_byte_length": "<i8",
    "box_offsets": "<i8",
    "box_sizes": "<i8",
    "chunk_file": "<i4",
    "chunk_format": "<i2",
}
_FORMAT_NAMES: dict[ItemFormat, str] = {ZipItem(): "zip", RawItem(): "raw"}
_UNREADABLE = (OSError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


@dataclass(frozen=True, slots=True)
class CatalogCache:
    """A directory of catalogs. It is never why something fails: a file that can't be used or written is logged."""

    directory: Path

    def get(self, digest: bytes, *, location: str) -> Catalog | None:
        """The catalog of the metadata with this digest; None if there is none, or its file is damaged or foreign."""
        path = self._path(digest)
        try:
            if not path.is_file():
                return None
            return decode_catalog(np.fromfile(path, dtype=np.uint8).data, location=location)
        except _UNREADABLE as error:
            logger.warning("%s: not used: %s: %s", path, type(error).__name__, error)
            return None

    def put(self, digest: bytes, catalog: Catalog) -> None:
        """Keep the catalog of the metadata with this digest. Other processes see the whole file or none."""
        path = self._path(digest)
        unfinished = path.with_suffix(f".{secrets.token_hex(8)}.unfinished")
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with unfinished.open("wb") as file:
                file.writelines(encode_catalog(catalog))
            unfinished.replace(path)
        except (OSError, ValueError) as error:  # a full disk; a path that no file system takes
            logger.warning("%s: not kept: %s", path, error)
            with contextlib.suppress(OSError, ValueError):
                unfinished.unlink(missing_ok=True)

    def _path(self, digest: bytes) -> Path:
        return self.directory / f"{digest.hex()}.catalog"


def encode_catalog(catalog: Catalog) -> list[Any]:
    """The bytes of a catalog's file: buffers, one after another."""
    tensors, objects, formats = catalog.tensors.values(), catalog.objects.values(), list(catalog.formats)
    content = {
        "columns": {name: getattr(catalog, name).size for name in _COLUMNS},
        "torch_metadata_version": catalog.torch_metadata_version,
        "files": catalog.files,
        "formats": [f.descriptors if isinstance(f, TransformedItem) else _FORMAT_NAMES[f] for f in formats],
        "keys": [tensor.key for tensor in tensors],
        "shapes": [tensor.shape for tensor in tensors],
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors],
        "num_chunks": [len(tensor.chunks) for tensor in tensors],
        "objects": [(o.key, o.file, o.byte_offset, o.byte_length, formats.index(o.format)) for o in objects],
        "paths": catalog.paths,
        "problems": catalog.problems,
    }
    header = json.dumps(content, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    columns = [np.ascontiguousarray(getattr(catalog, name), dtype).view(np.uint8) for name, dtype in _COLUMNS.items()]
    pieces: list[Any] = [len(header).to_bytes(8, "little"), header, *columns]
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return [_MAGIC, digest.digest(), *pieces]


def decode_catalog(data: memoryview, *, location: str) -> Catalog:
    """The catalog whose file has these bytes. Its columns are views of them.

    Raises:
        ValueError: the bytes are cut or changed, or are not a catalog of this version.
        AttributeError, LookupError, RecursionError, TypeError: the digest is right, but no catalog has this content.
    """
    magic, digest, num_json_bytes = (bytes(data[start:stop]) for start, stop in ((0, 8), (8, 40), (40, 48)))
    if magic != _MAGIC:
        raise ValueError("it is not a catalog of this version")
    if digest != hashlib.sha256(data[40:]).digest():
        raise ValueError("its bytes are damaged")
    start = 48 + int.from_bytes(num_json_bytes, "little")
    header: dict[str, Any] = json.loads(bytes(data[48:start]))
    columns: dict[str, Any] = {}
    for name, dtype in _COLUMNS.items():
        columns[name] = np.frombuffer(data, dtype, header["columns"][name], start)
        start += columns[name].nbytes
    if any(name_inside(file) != file for file in header["files"]):
        raise ValueError("it names a file outside of the checkpoint")
    by_name = {name: item_format for item_format, name in _FORMAT_NAMES.items()}
    formats = [TransformedItem(tuple(f)) if isinstance(f, list) else by_name[f] for f in header["formats"]]
    dtypes = {name: getattr(torch, name) for name in set(header["dtypes"])}
    if not all(isinstance(dtype, torch.dtype) for dtype in dtypes.values()):
        raise ValueError("it names a dtype that this torch does not have")
    shapes, paths = map(tuple, header["shapes"]), header["paths"]
    return Catalog(
        location=location,
        torch_metadata_version=header["torch_metadata_version"],
        files=tuple(header["files"]),
        tensors=saved_tensors(header["keys"], shapes, map(dtypes.__getitem__, header["dtypes"]), header["num_chunks"]),
        objects={key: SavedObject(key, *place, formats[f]) for key, *place, f in header["objects"]},  # type: ignore[call-arg]
        paths=None if paths is None else {key: tuple(path) for key, path in paths.items()},
        formats=tuple(formats),
        problems=tuple(header["problems"]),
        **columns,
    )
