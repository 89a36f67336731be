"""Turn a catalog into the bytes of one file and back: a JSON header and raw columns, as column_file.py has them.

What a storage tells of its files (sizes, versions) and its options are no part of it: they are asked for anew at each opening.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from shardferry.checkpoint.build import name_inside, saved_tensors
from shardferry.checkpoint.catalog import Catalog, SavedObject
from shardferry.checkpoint.column_file import FileKind, UnusableFile, decode_file, encode_file
from shardferry.checkpoint.item_format import ItemFormat, RawItem, TransformedItem, ZipItem

CATALOG_FILE = FileKind(
    noun="catalog",
    magic=b"SHFYCATL",
    version=1,  # to be raised whenever the bytes, or what is made of the same metadata, become other ones
    columns={
        "chunk_file": "<i4",
        "chunk_byte_offset": "<i8",
        "chunk_byte_length": "<i8",
        "chunk_format": "<i2",
        "box_offsets": "<i8",
        "box_sizes": "<i8",
    },
)
_WORDS: dict[ItemFormat, str] = {ZipItem(): "zip", RawItem(): "raw"}


def encode_catalog(catalog: Catalog) -> list[bytes | memoryview]:
    """The bytes of a catalog's file, one piece after another. Columns are not copied."""
    columns = {name: getattr(catalog, name) for name in CATALOG_FILE.columns}
    return encode_file(CATALOG_FILE, _header(catalog), columns)


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
    }


def decode_catalog(data: memoryview, *, location: str) -> Catalog:
    """The catalog whose file has these bytes. Its columns are views of them.

    Raises:
        UnusableFile: the bytes are cut, were changed, or are of another version.
    """
    return decode_file(CATALOG_FILE, data, lambda header, columns: _catalog(header, columns, location))


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
