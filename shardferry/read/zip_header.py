"""Find the raw bytes of a tensor inside a saved item, and how they are strided.

An item is what ``torch.save`` writes: a zip of stored (never compressed) records. Its head is enough::

    item     |local header|data.pkl|...|local header|padding|raw bytes of data/0|...|central directory|
    head     |<------------------ some 700 bytes ---------->|

``data.pkl`` is a small pickle that gives dtype, size, stride and storage offset; a restricted unpickler reads it. The
raw bytes start where the zip says: never at a constant. Format: torch/serialization.py, caffe2/serialize/inline_container.cc.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from shardferry.errors import DecodeError

HEAD_BYTES = 1024  # one read of this size reaches past the header of nearly every item
MAX_HEAD_BYTES = 512 * 1024  # a head has up to 6 records, each padded by up to 64 KiB where the writer aligns them so

_LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")
_LOCAL_MAGIC = b"PK\x03\x04"
_DESCRIPTOR_MAGIC = b"PK\x07\x08"
_DESCRIPTOR_BYTES = (16, 24)  # with 32-bit and with 64-bit sizes


@dataclass(frozen=True, slots=True)
class ItemLayout:
    """Where a saved tensor's elements are, from the start of its item."""

    raw_start: int  # bytes, first byte of the storage
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # elements
    storage_offset: int  # elements

    def byte_position(self, index: tuple[int, ...]) -> int:
        """Where one element starts, from the start of the item."""
        elements = self.storage_offset + sum(i * s for i, s in zip(index, self.strides, strict=True))
        return self.raw_start + elements * self.dtype.itemsize


class HeadTooShort(Exception):
    """The head ends before the raw bytes start; read more."""


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: torch.dtype | None  # None: untyped, the tensor says
    key: str
    numel: int  # elements; bytes where untyped


def parse_head(head: bytes) -> ItemLayout:
    """Parse the first bytes of a tensor's item.

    Raises:
        HeadTooShort: the raw bytes start beyond the head.
        DecodeError: this is no item that ``torch.save`` wrote of one dense tensor.
    """
    pickled: ItemLayout | None = None
    position = 0
    while True:
        name, start = _local_header(head, position)
        if name.endswith("/data/0"):
            if pickled is None:
                raise DecodeError("the item's data comes before its description")
            return ItemLayout(start, pickled.dtype, pickled.shape, pickled.strides, pickled.storage_offset)
        if start > len(head):
            raise HeadTooShort
        if name.endswith("/data.pkl"):
            pickled, length = _parse_description(head, start)
        else:
            length = _record_length(head, start)
        if name.endswith("/byteorder"):
            _check_byte_order(head[start : start + length])
        position = _after_descriptor(head, start + length)


def _local_header(head: bytes, position: int) -> tuple[str, int]:
    """Name and data position of the record whose local header stands at ``position``; the data may be beyond the head."""
    if position + _LOCAL_HEADER.size > len(head):
        raise HeadTooShort
    magic, _, _, method, _, _, _, _, _, name_length, extra_length = _LOCAL_HEADER.unpack_from(head, position)
    if magic != _LOCAL_MAGIC:
        raise DecodeError(f"no zip record at byte {position} of the item (found {magic!r})")
    if method != 0:
        raise DecodeError(f"the zip record at byte {position} of the item is compressed (method {method})")
    name_start = position + _LOCAL_HEADER.size
    if name_start + name_length > len(head):
        raise HeadTooShort
    name = head[name_start : name_start + name_length].decode("utf-8", "replace")
    return name, name_start + name_length + extra_length


def _record_length(head: bytes, start: int) -> int:
    """Length of a small record, whose size stands only in the descriptor behind it."""
    end = head.find(_DESCRIPTOR_MAGIC, start)
    while end >= 0:
        if len(head) >= end + 16 and struct.unpack_from("<I", head, end + 8)[0] == end - start:
            return end - start
        end = head.find(_DESCRIPTOR_MAGIC, end + 1)
    raise HeadTooShort


def _after_descriptor(head: bytes, end: int) -> int:
    """Position of the next local header, behind the descriptor of the record that ends at ``end``."""
    if head[end : end + 4] != _DESCRIPTOR_MAGIC:
        if end + 4 > len(head):
            raise HeadTooShort
        return end  # sizes stood in the local header; no descriptor
    for length in _DESCRIPTOR_BYTES:
        if end + length + 4 > len(head):
            raise HeadTooShort
        if head[end + length : end + length + 4] == _LOCAL_MAGIC:
            return end + length
    raise DecodeError(f"no zip record follows the one that ends at byte {end} of the item")


def _check_byte_order(order: bytes) -> None:
    if order.decode("ascii", "replace") != sys.byteorder:
        raise DecodeError(f"the item was saved on a {order!r}-endian machine, this one is {sys.byteorder}-endian")


def _parse_description(head: bytes, start: int) -> tuple[ItemLayout, int]:
    stream = io.BytesIO(head[start:])
    try:
        value = _ItemUnpickler(stream).load()
    except DecodeError:
        raise
    except Exception as error:  # a cut pickle raises nearly any type
        if len(head) < MAX_HEAD_BYTES:
            raise HeadTooShort from error
        raise DecodeError(f"the item's description is damaged ({type(error).__name__}: {error})") from error
    if not isinstance(value, ItemLayout):
        raise DecodeError(f"the item holds a {type(value).__name__}, not a tensor")
    return value, stream.tell()


class _ItemUnpickler(pickle.Unpickler):
    """Reads the description of one dense tensor; refuses every other global."""

    def find_class(self, module: str, name: str) -> Any:
        known = _ITEM_GLOBALS.get((module, name))
        if known is not None:
            return known
        if module == "torch" and name in _TYPED_STORAGES:
            return _TYPED_STORAGES[name]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise DecodeError(f"the item's description names {module}.{name}, which no plain tensor needs; refused")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _location, numel = pid
        if kind != "storage" or str(key) != "0":
            raise DecodeError(f"the item refers to {pid!r}, not to its own storage")
        return _Storage(dtype if isinstance(dtype, torch.dtype) else None, str(key), int(numel))


def _tensor_v2(
    storage: _Storage, offset: int, size: Any, stride: Any, _grad: Any, _hooks: Any, remarks: Any = None
) -> ItemLayout:
    if storage.dtype is None:
        raise DecodeError("the item's storage has no dtype")
    return _layout(storage.dtype, offset, size, stride, remarks)


def _tensor_v3(
    _storage: _Storage,
    offset: int,
    size: Any,
    stride: Any,
    _grad: Any,
    _hooks: Any,
    dtype: Any,
    remarks: Any = None,
) -> ItemLayout:
    if not isinstance(dtype, torch.dtype):
        raise DecodeError("the item's tensor has no dtype")
    return _layout(dtype, offset, size, stride, remarks)


def _layout(dtype: torch.dtype, offset: int, size: Any, stride: Any, remarks: Any) -> ItemLayout:
    """Where the raw bytes start is not known yet."""
    if remarks:  # {"conj": True}, {"neg": True}: the values are not what the bytes say
        raise DecodeError(
            f"the item's tensor is a lazy view ({', '.join(map(str, remarks))}): its values are not those of its bytes; save "
            "tensor.resolve_conj().resolve_neg()"
        )
    return ItemLayout(0, dtype, tuple(size), tuple(stride), int(offset))


def _parameter(data: ItemLayout, *_: Any) -> ItemLayout:
    return data


_TYPED_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
}

_ITEM_GLOBALS: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "UntypedStorage"): "untyped",
    ("torch", "UntypedStorage"): "untyped",
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): dict,
}


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings, lists and dicts; refuses every global. Twenty times as fast as `torch.load`."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError(str(pid))


def decode_object(data: bytes) -> Any:
    """The Python value of a saved object: numbers, strings, lists, dicts and tensors; nothing is executed.

    Raises:
        DecodeError: the bytes are damaged, or hold a type that isn't plain data.
    """
    with suppress(Exception):  # not as plain as nearly all are: torch's own loader decides
        _, start = _local_header(data, 0)
        return _PlainUnpickler(io.BytesIO(data[start:])).load()
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged items raise nearly any type
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DecodeError(f"the saved object of {len(data)} bytes is damaged or not plain data ({reason})") from error
