"""Turn a catalog into the bytes of one file and back: a JSON header and raw columns, nothing that could be executed.

::

    |magic, version, lengths, digest of all else: 64 bytes|JSON|...|column|...|column|...

Each column begins at a multiple of 64 bytes and is used where it lies. What a storage tells of its files (sizes, versions)
and its options are no part of it: they are asked for anew at each opening.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from shardferry.catalog import Catalog, SavedObject
from shardferry.catalog_builder import name_inside, saved_tensors
from shardferry.item_format import ItemFormat, RawItem, TransformedItem, ZipItem

# To be raised whenever these bytes, or what is made of the same metadata, become other ones.
FORMAT_VERSION = 1

_MAGIC = b"SHFYCATL"
_HEAD = struct.Struct("<8sQQQ")  # magic, version, bytes of the JSON, bytes of the file
_DIGEST_BYTES = 32
_JSON_START = _HEAD.size + _DIGEST_BYTES
_ALIGNMENT = 64
_COLUMNS = {
    "chunk_file": "<i4",
    "chunk_byte_offset": "<i8",
    "chunk_byte_length": "<i8",
    "chunk_format": "<i2",
    "box_offsets": "<i8",
    "box_sizes": "<i8",
}
_WORDS: dict[ItemFormat, str] = {ZipItem(): "zip", RawItem(): "raw"}


class UnusableFile(ValueError):
    """Bytes that are no whole catalog of this version; says why."""


def encode_catalog(catalog: Catalog) -> list[bytes | memoryview]:
    """The bytes of a catalog's file, one piece after another. Columns are not copied."""
    header = json.dumps(_header(catalog), separators=(",", ":")).encode()
    contents: list[bytes | memoryview] = [header]
    contents += [_bytes_of(getattr(catalog, name), dtype) for name, dtype in _COLUMNS.items()]
    pieces = [piece for content in contents for piece in (content, bytes(-len(content) % _ALIGNMENT))]
    head = _HEAD.pack(_MAGIC, FORMAT_VERSION, len(header), _JSON_START + sum(map(len, pieces)))
    return [head, _digest(head, *pieces), *pieces]


def _bytes_of(column: np.ndarray, dtype: str) -> memoryview:
    return memoryview(np.ascontiguousarray(column, dtype).view(np.uint8))  # type: ignore[arg-type]  # arrays are buffers


def _digest(*pieces: bytes | memoryview) -> bytes:
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for piece in pieces:
        digest.update(piece)
    return digest.digest()


def _header(catalog: Catalog) -> dict[str, Any]:
    tensors, objects, formats = catalog.tensors.values(), catalog.objects.values(), list(catalog.formats)
    dtypes = list(dict.fromkeys(tensor.dtype for tensor in tensors))
    dtype_rows = {dtype: row for row, dtype in enumerate(dtypes)}
    return {
        "torch_metadata_version": catalog.torch_metadata_version,
        "files": catalog.files,
        "formats": [_format_words(item_format) for item_format in formats],
        "dtypes": [str(dtype).removeprefix("torch.") for dtype in dtypes],
        "tensors": {
            "keys": [tensor.key for tensor in tensors],
            "shapes": [tensor.shape for tensor in tensors],
            "dtypes": [dtype_rows[tensor.dtype] for tensor in tensors],
            "num_chunks": [len(tensor.chunks) for tensor in tensors],
        },
        "objects": [(o.key, o.file, o.byte_offset, o.byte_length, formats.index(o.format)) for o in objects],
        "paths": catalog.paths,
        "problems": catalog.problems,
        "columns": [getattr(catalog, name).size for name in _COLUMNS],
    }


def decode_catalog(data: memoryview, *, location: str) -> Catalog:
    """The catalog whose file has these bytes. Its columns are views of them.

    Raises:
        UnusableFile: the bytes are cut, were changed, or are of another version.
    """
    header_bytes = _checked_head(data)
    try:
        header = json.loads(bytes(data[_JSON_START : _JSON_START + header_bytes]))
        columns = dict(_columns(data, _aligned(_JSON_START + header_bytes), header["columns"]))
        return _catalog(header, columns, location)
    except UnusableFile:
        raise
    except (AttributeError, LookupError, RecursionError, StopIteration, TypeError, ValueError) as error:
        raise UnusableFile(f"it is no catalog ({type(error).__name__}: {error})") from error


def _checked_head(data: memoryview) -> int:
    """Bytes of the JSON."""
    if len(data) < _JSON_START:
        raise UnusableFile(f"it has {len(data)} bytes, which is less than a head")
    head, digest = data[: _HEAD.size], data[_HEAD.size : _JSON_START]
    magic, version, header_bytes, num_bytes = _HEAD.unpack(head)
    if magic != _MAGIC:
        raise UnusableFile("it is no catalog")
    if version != FORMAT_VERSION:
        raise UnusableFile(f"it is of version {version}, not {FORMAT_VERSION}")
    if num_bytes != len(data):
        raise UnusableFile(f"it has {len(data)} of its {num_bytes} bytes")
    if _digest(head, data[_JSON_START:]) != digest:
        raise UnusableFile("its bytes were changed")
    return int(header_bytes)


def _columns(data: memoryview, start: int, lengths: list[int]) -> Iterator[tuple[str, np.ndarray]]:
    for (name, dtype), length in zip(_COLUMNS.items(), lengths, strict=True):
        yield name, np.frombuffer(data, dtype, length, start)
        start = _aligned(start + length * np.dtype(dtype).itemsize)


def _aligned(num_bytes: int) -> int:
    return num_bytes + -num_bytes % _ALIGNMENT


def _catalog(header: Mapping[str, Any], columns: Mapping[str, Any], location: str) -> Catalog:
    if any(name_inside(file) != file for file in header["files"]):
        raise UnusableFile("it names a file outside of the checkpoint")
    formats = [_format(words) for words in header["formats"]]
    dtypes = [_dtype(name) for name in header["dtypes"]]
    tensors = header["tensors"]
    objects = {
        key: SavedObject(key, file, byte_offset, byte_length, formats[row])
        for key, file, byte_offset, byte_length, row in header["objects"]
    }
    paths = header["paths"]
    return Catalog(
        location=location,
        torch_metadata_version=header["torch_metadata_version"],
        files=tuple(header["files"]),
        tensors=saved_tensors(
            tensors["keys"],
            map(tuple, tensors["shapes"]),
            map(dtypes.__getitem__, tensors["dtypes"]),
            tensors["num_chunks"],
        ),
        objects=objects,
        paths=None if paths is None else {key: tuple(path) for key, path in paths.items()},
        formats=tuple(formats),
        problems=tuple(header["problems"]),
        **columns,
    )


def _format_words(item_format: ItemFormat) -> Any:
    return item_format.descriptors if isinstance(item_format, TransformedItem) else _WORDS[item_format]


def _format(words: Any) -> ItemFormat:
    if isinstance(words, list):
        return TransformedItem(tuple(words))
    return next(item_format for item_format, word in _WORDS.items() if word == words)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise UnusableFile(f"this torch has no dtype {name!r}")
    return dtype
