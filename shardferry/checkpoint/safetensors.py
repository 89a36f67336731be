"""Turn the headers of safetensors files into a catalog, or into the byte positions of one.

::

    file     |8 bytes: length of the JSON|JSON|raw bytes of all tensors, row-major, at data_offsets from here|

``HuggingFaceStorageWriter`` leaves no ``.metadata``, but a shard's offsets under ``__metadata__`` of the JSON. ``FileSystemWriter``
with ``SerializationFormat.SAFETENSORS`` leaves a ``.metadata`` whose byte positions are wrong. Every length and position is
compared with the file. Format: https://huggingface.co/docs/safetensors and torch/distributed/checkpoint/_hf_utils.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from shardferry.checkpoint.build import build_catalog
from shardferry.checkpoint.catalog import NO_FILE, Catalog, RawItem, SavedTensor, ZipItem
from shardferry.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageInfo,
    TensorProperties,
    TensorStorageMetadata,
)
from shardferry.errors import CatalogError
from shardferry.storage.base import RangeReader, read_file

SUFFIX = ".safetensors"
INDEX_FILE = "model.safetensors.index.json"  # which file holds which tensor; not every writer leaves one
SINGLE_FILE = "model.safetensors"  # the name of a model in one file
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package
SHARDING_REMARK, OFFSETS_REMARK = "DCP_SHARDING_INFO", "saved_offsets"  # where torch records a shard's offsets

_HEADERS_AT_ONCE = 16
_LENGTH_BYTES = 8
_USUAL_HEADER_BYTES = 64 * 1024  # one read of this size holds nearly every header
_ZIP_MAGIC = b"PK\x03\x04"
_DAMAGE = (AttributeError, KeyError, TypeError, ValueError, RecursionError)  # raised by JSON that is not as expected

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RawTensor:
    """One tensor of a file: a shard of a saved tensor, or the whole of it."""

    key: str
    path: str  # of the file
    dtype: torch.dtype
    offsets: tuple[int, ...]  # in the whole tensor, elements; zeros where the file does not record them
    sizes: tuple[int, ...]  # elements
    byte_offset: int  # in the file
    nbytes: int


def open_safetensors(storage: RangeReader, names: Sequence[str]) -> Catalog | None:
    """The catalog of all safetensors files among ``names``; None if there are none. Each whole tensor ends where its last shard ends.

    Raises:
        StorageError: a file that the index names is missing.
        CatalogError: a file is damaged, or two files contradict each other.
    """
    if not (paths := [name for name in names if name.endswith(SUFFIX)]):
        return None
    if INDEX_FILE in names:  # beside the files that it names there may be the same weights once more
        try:
            paths = sorted(set(map(str, json.loads(read_file(storage, INDEX_FILE))["weight_map"].values())))
        except _DAMAGE as error:
            what = f"{storage.location}/{INDEX_FILE}: is damaged ({type(error).__name__}: {error})"
            raise CatalogError(what) from error
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
    metadata = Metadata()  # as a DCP writer would have left it
    metadata.state_dict_metadata = {
        key: _tensor_metadata(list(boxes.values()), storage.location) for key, boxes in shards.items()
    }
    metadata.storage_data = {}
    for box in (box for boxes in shards.values() for box in boxes.values()):
        place = {"relative_path": box.path, "offset": box.byte_offset, "length": box.nbytes, "is_raw": True}
        metadata.storage_data[MetadataIndex([{"fqn": box.key, "offset": box.offsets}])] = StorageInfo([place])
    metadata.version = "safetensors"
    return build_catalog([(storage.location, metadata)], location=storage.location)


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
    tensor.chunks = [ChunkStorageMetadata([{"offsets": box.offsets, "sizes": box.sizes}]) for box in boxes]
    return tensor


def with_safetensors_positions(catalog: Catalog, storage: RangeReader) -> Catalog:
    """The catalog with the byte positions that the headers give, for tensors that are in safetensors files.

    The metadata shows which files these are: the item of a tensor has exactly the bytes of its elements, and a zip has more.

    Raises:
        StorageError: a file is missing.
        CatalogError: a file also holds Python objects, or lacks a tensor: both happen when torch writes this format.
    """
    tensors = list(catalog.tensors.values())
    starts = [tensor.chunks.start for tensor in tensors]

    def tensor_of(chunk: int) -> SavedTensor:
        return tensors[bisect_right(starts, chunk) - 1]

    files, chunks = np.unique(catalog.chunk_file, return_index=True)  # a writer writes all of a file in one format
    first_chunks = dict(zip(files.tolist(), chunks.tolist(), strict=True))
    bare = [
        file for file, chunk in first_chunks.items() if file != NO_FILE and _is_bare(catalog, tensor_of(chunk), chunk)
    ]
    if not bare:
        return catalog
    byte_offset, chunk_format = catalog.chunk_byte_offset.copy(), catalog.chunk_format.copy()
    for file in bare:
        chunks = np.flatnonzero(catalog.chunk_file == file)
        saved = [(chunk, tensor_of(chunk)) for chunk in chunks.tolist()]
        byte_offset[chunks] = _positions(catalog, saved, catalog.files[file], storage)
        chunk_format[chunks] = len(catalog.formats)
    return dataclasses.replace(
        catalog, chunk_byte_offset=byte_offset, chunk_format=chunk_format, formats=(*catalog.formats, RawItem())
    )


def _is_bare(catalog: Catalog, saved: SavedTensor, chunk: int) -> bool:
    if not isinstance(catalog.formats[catalog.chunk_format[chunk]], ZipItem):
        return False
    return int(catalog.chunk_byte_length[chunk]) == catalog.region(saved, chunk).numel * saved.dtype.itemsize


def _positions(
    catalog: Catalog, saved: Sequence[tuple[int, SavedTensor]], path: str, storage: RangeReader
) -> list[int]:
    """The byte offsets of all chunks of one file, by the file's header."""
    try:
        header = {tensor.key: tensor for tensor in read_header(storage, path)}
    except CatalogError as error:
        why = f"{error}. Torch writes Python objects and tensors over each other in this format"
        raise _unusable(saved[0][1].key, why) from error
    byte_offsets = []
    for chunk, of in saved:
        region, tensor = catalog.region(of, chunk), header.get(of.key)
        wanted = f"{of.dtype} of shape {region.sizes} from {region.offsets} on"
        found = f"{tensor.dtype} of shape {tensor.sizes} from {tensor.offsets} on" if tensor else "no such tensor"
        if tensor is None or found != wanted:
            raise _unusable(of.key, f"{storage.location}/{path} holds {found}, not {wanted}")
        byte_offsets.append(tensor.byte_offset)
    return byte_offsets


def _unusable(key: str, why: str) -> CatalogError:
    return CatalogError(
        f"{key}: was saved with SerializationFormat.SAFETENSORS, which keeps only tensors and one shard of each in a file: "
        f"{why}. Save again with FileSystemWriter's default format, or with HuggingFaceStorageWriter."
    )


def read_header(storage: RangeReader, path: str) -> list[RawTensor]:
    """The tensors of one file, in the order of their bytes.

    Raises:
        StorageError: the file is missing.
        CatalogError: it is not a safetensors file, or is damaged.
    """
    where, file_bytes = f"{storage.location}/{path}", storage.size(path)
    start = bytearray(min(file_bytes, _USUAL_HEADER_BYTES))
    storage.read_into(path, 0, memoryview(start))
    if start.startswith(_ZIP_MAGIC):
        raise CatalogError(
            f"{where}: begins with a zip record, as Python objects are saved, not with a safetensors header"
        )
    header_bytes = int.from_bytes(start[:_LENGTH_BYTES], "little")
    if file_bytes < _LENGTH_BYTES or header_bytes > min(MAX_HEADER_BYTES, file_bytes - _LENGTH_BYTES):
        raise CatalogError(
            f"{where}: has {file_bytes} bytes, and its header would have {header_bytes}; it is cut, or not a safetensors file"
        )
    header = start[_LENGTH_BYTES : _LENGTH_BYTES + header_bytes]
    if rest := bytearray(header_bytes - len(header)):
        storage.read_into(path, len(start), memoryview(rest))
    return parse_header(bytes(header + rest), path=path, file_bytes=file_bytes, where=where)


def parse_header(header: bytes, *, path: str, file_bytes: int, where: str) -> list[RawTensor]:
    """Parse the JSON of a header.

    Args:
        header: the JSON.
        path: of the file, in the checkpoint.
        file_bytes: size of the file.
        where: the file, for error messages.

    Raises:
        CatalogError: it is damaged, or contradicts the file's size.
    """
    data_start = _LENGTH_BYTES + len(header)
    try:
        entries = json.loads(header, object_pairs_hook=_without_duplicates)
        sharding = (entries.pop("__metadata__", None) or {}).get(SHARDING_REMARK)
        offsets = None  # of each tensor in its whole tensor; None where the file does not record them
        if sharding is not None:
            offsets = {key: _integers(info[OFFSETS_REMARK]) for key, info in json.loads(sharding).items()}
        tensors = [_raw_tensor(key, entry, offsets, path, data_start) for key, entry in entries.items()]
    except CatalogError as error:
        raise CatalogError(f"{where}: {error}") from None
    except _DAMAGE as error:
        raise CatalogError(f"{where}: its header is damaged ({type(error).__name__}: {error})") from error
    tensors.sort(key=lambda tensor: (tensor.byte_offset, tensor.nbytes))
    for one, other in pairwise(tensors):
        if one.byte_offset + one.nbytes > other.byte_offset:
            raise CatalogError(
                f"{where}: {one.key} ends at byte {one.byte_offset + one.nbytes}, but {other.key} begins at byte "
                f"{other.byte_offset}; the file is damaged"
            )
    if tensors and (last := tensors[-1]).byte_offset + last.nbytes > file_bytes:
        raise CatalogError(
            f"{where}: {last.key} ends at byte {last.byte_offset + last.nbytes}, the file has {file_bytes}; it is cut"
        )
    return tensors


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it has one name twice")
    return found


def _raw_tensor(
    key: str, entry: Any, offsets: Mapping[str, tuple[int, ...]] | None, path: str, data_start: int
) -> RawTensor:
    dtype, sizes = _DTYPES.get(entry["dtype"]), _integers(entry["shape"])
    start, stop = _integers(entry["data_offsets"])
    if dtype is None:
        raise CatalogError(f"{key}: its dtype {entry['dtype']!r} is not one that torch has: {', '.join(_DTYPES)}")
    if stop - start != math.prod(sizes) * dtype.itemsize:
        raise CatalogError(
            f"{key}: has {stop - start} bytes, but {dtype} of shape {sizes} takes {math.prod(sizes) * dtype.itemsize}"
        )
    begin = (0,) * len(sizes) if offsets is None else offsets[key]
    if len(begin) != len(sizes):
        raise CatalogError(f"{key}: has shape {sizes}, and would begin at {begin} of the whole")
    return RawTensor(
        key=key,
        path=path,
        dtype=dtype,
        offsets=begin,
        sizes=sizes,
        byte_offset=data_start + start,
        nbytes=stop - start,
    )


def _integers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < 2**63 for value in values):
        raise ValueError(f"{values!r} is not a list of sizes")
    return tuple(values)
