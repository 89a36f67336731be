"""Turn the header of a safetensors file into its tensors: dtype, box, and where the raw bytes are.

::

    file     |8 bytes: length of the JSON|JSON|raw bytes of all tensors, row-major, at data_offsets from here|

Where torch wrote a shard, its place in the whole tensor stands in the JSON, under ``__metadata__``. Nothing is believed:
every length and position is held against the file. Format: https://huggingface.co/docs/safetensors and
torch/distributed/checkpoint/_hf_utils.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from shardferry.errors import CatalogError
from shardferry.storage.base import RangeReader

MAX_HEADER_BYTES = 100_000_000  # as the safetensors package has it

SHARDING_REMARK, OFFSETS_REMARK = "DCP_SHARDING_INFO", "saved_offsets"  # torch's remarks on where a shard belongs

_LENGTH_BYTES = 8
_USUAL_HEADER_BYTES = 64 * 1024  # one read of this size holds nearly every header
_ZIP_MAGIC = b"PK\x03\x04"

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


@dataclass(frozen=True, slots=True)
class RawTensor:
    """One tensor of a file: a box of a saved tensor, or the whole of it."""

    key: str
    path: str
    dtype: torch.dtype
    offsets: tuple[int, ...]  # in the whole tensor, elements; zeros where the file doesn't tell
    sizes: tuple[int, ...]
    byte_offset: int  # in the file
    nbytes: int


def read_header(storage: RangeReader, path: str) -> list[RawTensor]:
    """The tensors of one file, in the order of their bytes.

    Raises:
        StorageError: the file is missing.
        CatalogError: it is no safetensors file, or is damaged.
    """
    where, file_bytes = f"{storage.location}/{path}", storage.size(path)
    start = bytearray(min(file_bytes, _USUAL_HEADER_BYTES))
    storage.read_into(path, 0, memoryview(start))
    header_bytes = _header_bytes(bytes(start[:_LENGTH_BYTES]), file_bytes, where)
    header = bytearray(header_bytes)
    known = start[_LENGTH_BYTES : _LENGTH_BYTES + header_bytes]
    header[: len(known)] = known
    if len(known) < header_bytes:
        storage.read_into(path, _LENGTH_BYTES + len(known), memoryview(header)[len(known) :])
    return parse_header(bytes(header), path=path, file_bytes=file_bytes, where=where)


def _header_bytes(start: bytes, file_bytes: int, where: str) -> int:
    if start.startswith(_ZIP_MAGIC):
        raise CatalogError(
            f"{where}: begins with a zip record, as Python objects are saved, not with a safetensors header"
        )
    length = int.from_bytes(start, "little")
    if len(start) < _LENGTH_BYTES or length > min(MAX_HEADER_BYTES, file_bytes - _LENGTH_BYTES):
        raise CatalogError(
            f"{where}: has {file_bytes} bytes, and its header would have {length}; it is cut, or no safetensors file"
        )
    return length


def parse_header(header: bytes, *, path: str, file_bytes: int, where: str) -> list[RawTensor]:
    """Parse the JSON of a header; see `read_header`.

    Args:
        where: the file, for error messages.
    """
    data_start = _LENGTH_BYTES + len(header)
    try:
        entries = json.loads(header, object_pairs_hook=_without_duplicates)
        offsets = _saved_offsets(entries.pop("__metadata__", None) or {})
        tensors = [_raw_tensor(key, entry, offsets, path, data_start) for key, entry in entries.items()]
    except CatalogError as error:
        raise CatalogError(f"{where}: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CatalogError(f"{where}: its header is damaged ({type(error).__name__}: {error})") from error
    tensors.sort(key=lambda tensor: (tensor.byte_offset, tensor.nbytes))
    _check_positions(tensors, file_bytes, where)
    return tensors


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in it")
    return found


def _saved_offsets(remarks: Mapping[str, str]) -> dict[str, tuple[int, ...]] | None:
    """Where each tensor of a file begins in its whole; None where the file says nothing about it."""
    sharding = remarks.get(SHARDING_REMARK)
    if sharding is None:
        return None
    return {key: _integers(info[OFFSETS_REMARK]) for key, info in json.loads(sharding).items()}


def _raw_tensor(
    key: str, entry: Any, offsets: Mapping[str, tuple[int, ...]] | None, path: str, data_start: int
) -> RawTensor:
    dtype, sizes, (start, stop) = (
        _DTYPES.get(entry["dtype"]),
        _integers(entry["shape"]),
        _integers(entry["data_offsets"]),
    )
    if dtype is None:
        raise CatalogError(f"{key}: its dtype {entry['dtype']!r} is none of those that torch has: {', '.join(_DTYPES)}")
    if stop - start != math.prod(sizes) * dtype.itemsize:
        raise CatalogError(
            f"{key}: has {stop - start} bytes, but {dtype} of shape {sizes} takes {math.prod(sizes) * dtype.itemsize}"
        )
    begin = (0,) * len(sizes) if offsets is None else offsets[key]
    if len(begin) != len(sizes):
        raise CatalogError(f"{key}: has shape {sizes}, and would begin at {begin} of the whole")
    return RawTensor(key, path, dtype, begin, sizes, data_start + start, stop - start)


def _integers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < 2**63 for value in values):
        raise ValueError(f"{values!r} is no list of sizes")
    return tuple(values)


def _check_positions(tensors: Sequence[RawTensor], file_bytes: int, where: str) -> None:
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
