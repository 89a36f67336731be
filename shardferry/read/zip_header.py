"""Parse the header of a saved tensor: where its raw bytes start in the item, and how they are strided.

``torch.save`` writes an item as a zip of stored (never compressed) records. The bytes up to the raw data are its header::

    item     |local header|data.pkl|...|local header|padding|raw bytes of data/0|...|central directory|
    header   |<------------------ some 700 bytes ---------->|

``data.pkl`` is a small pickle that gives dtype, size, stride and storage offset; a restricted unpickler reads it. The
raw bytes start where the zip says, not at a constant. Format: torch/serialization.py, caffe2/serialize/inline_container.cc.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import sys
from dataclasses import dataclass
from typing import Any

import torch

from shardferry.errors import DecodeError

HEADER_BYTES = 1024  # nearly every header fits
MAX_HEADER_BYTES = 512 * 1024  # up to 6 records, each padded to up to 64 KiB by writers that align them

_MAX_NAME = 200  # characters of a class's name in a message
_LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")
_LOCAL_MAGIC = b"PK\x03\x04"
_DESCRIPTOR_MAGIC = b"PK\x07\x08"
_DESCRIPTOR_BYTES = (16, 24)  # with 32-bit and with 64-bit sizes


@dataclass(frozen=True, slots=True)
class ItemLayout:
    """Positions of a saved tensor's elements, from the start of its item."""

    raw_start: int  # bytes, first byte of the storage
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # elements
    storage_offset: int  # elements

    def byte_position(self, index: tuple[int, ...]) -> int:
        """Byte offset of one element, from the start of the item."""
        elements = self.storage_offset + sum(i * s for i, s in zip(index, self.strides, strict=True))
        return self.raw_start + elements * self.dtype.itemsize


class HeaderTooShort(Exception):
    """The bytes end before the raw data starts; read more."""


class QuantisedState(DecodeError):
    """The item is a tensor of a class of its own, whose elements only the code of that class can make. The file is whole."""


class _ForeignGlobal(DecodeError):
    """The description names something that no plain tensor needs."""


def parse_header(header: bytes) -> ItemLayout:
    """Parse the first bytes of a tensor's item.

    Raises:
        HeaderTooShort: the raw data starts beyond ``header``.
        DecodeError: the item is not what ``torch.save`` writes of one dense tensor.
    """
    pickled: ItemLayout | None = None
    position = 0
    while True:
        name, start = _local_header(header, position)
        if name.endswith("/data/0"):
            if pickled is None:
                raise DecodeError("the item's data comes before its description")
            return ItemLayout(start, pickled.dtype, pickled.shape, pickled.strides, pickled.storage_offset)
        if start > len(header):
            raise HeaderTooShort
        if name.endswith("/data.pkl"):
            pickled, length = _parse_description(header, start)
        else:
            length = _record_length(header, start)
        if name.endswith("/byteorder"):
            _check_byte_order(header[start : start + length])
        position = _after_descriptor(header, start + length)


def first_record_start(data: bytes) -> int:
    """Where the first record's data starts. Raises HeaderTooShort, DecodeError."""
    return _local_header(data, 0)[1]


def _local_header(header: bytes, position: int) -> tuple[str, int]:
    """Name and data position of the record whose local header stands at ``position``; the data may be beyond the header."""
    if position + _LOCAL_HEADER.size > len(header):
        raise HeaderTooShort
    magic, _, _, method, _, _, _, _, _, name_length, extra_length = _LOCAL_HEADER.unpack_from(header, position)
    if magic != _LOCAL_MAGIC:
        raise DecodeError(f"no zip record at byte {position} of the item (found {magic!r})")
    if method != 0:
        raise DecodeError(f"the zip record at byte {position} of the item is compressed (method {method})")
    name_start = position + _LOCAL_HEADER.size
    if name_start + name_length > len(header):
        raise HeaderTooShort
    name = header[name_start : name_start + name_length].decode("utf-8", "replace")
    return name, name_start + name_length + extra_length


def _record_length(header: bytes, start: int) -> int:
    """Length of a small record, whose size stands only in the descriptor behind it."""
    end = header.find(_DESCRIPTOR_MAGIC, start)
    while end >= 0:
        if len(header) >= end + 16 and struct.unpack_from("<I", header, end + 8)[0] == end - start:
            return end - start
        end = header.find(_DESCRIPTOR_MAGIC, end + 1)
    raise HeaderTooShort


def _after_descriptor(header: bytes, end: int) -> int:
    """Position of the next local header, behind the descriptor of the record that ends at ``end``."""
    if header[end : end + 4] != _DESCRIPTOR_MAGIC:
        if end + 4 > len(header):
            raise HeaderTooShort
        return end  # sizes stood in the local header; no descriptor
    for length in _DESCRIPTOR_BYTES:
        if end + length + 4 > len(header):
            raise HeaderTooShort
        if header[end + length : end + length + 4] == _LOCAL_MAGIC:
            return end + length
    raise DecodeError(f"no zip record follows the one that ends at byte {end} of the item")


def _check_byte_order(order: bytes) -> None:
    if order.decode("ascii", "replace") != sys.byteorder:
        raise DecodeError(f"the item was saved on a {order!r}-endian machine, this one is {sys.byteorder}-endian")


def _parse_description(header: bytes, start: int) -> tuple[ItemLayout, int]:
    stream = io.BytesIO(header[start:])
    try:
        value = _ItemUnpickler(stream).load()
    except _ForeignGlobal:
        _refuse_tensor_classes(header, start)
        raise
    except DecodeError:
        raise
    except Exception as error:  # a cut pickle raises nearly any type
        if len(header) < MAX_HEADER_BYTES:
            raise HeaderTooShort from error
        raise DecodeError(f"the item's description is damaged ({type(error).__name__}: {error})") from error
    if not isinstance(value, ItemLayout):
        raise DecodeError(f"the item holds a {type(value).__name__}, not a tensor")
    return value, stream.tell()


def _refuse_tensor_classes(header: bytes, start: int) -> None:
    """Name the class of a quantised tensor or another tensor subclass. Nothing is unpickled.

    Raises:
        HeaderTooShort: the description goes on after ``header``.
        QuantisedState: it is one of these.
    """
    names: list[tuple[str, str]] = []
    try:
        for operation, argument, _ in pickletools.genops(header[start:]):
            if operation.name == "GLOBAL":
                module, _, name = str(argument).partition(" ")
                names.append((module, name))
    except Exception as error:  # a cut pickle raises nearly any type
        if len(header) < MAX_HEADER_BYTES:
            raise HeaderTooShort from error
        return
    if not names or names[0] not in _CLASS_MAKERS:
        return
    found = next((".".join(name) for name in names[1:] if name[0] != "torch._utils"), names[0][1])
    raise QuantisedState(
        f"quantised state: the item is a tensor of the class {found[:_MAX_NAME]}, whose elements only the code of that class can make out of "
        "its parts (codes, scales); code that a checkpoint names is not run. Leave the parameter out with exclude, or save it "
        "dequantised, as a plain tensor"
    )


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
        raise _ForeignGlobal(f"the item's description names {module}.{name}, which no plain tensor needs; refused")

    def persistent_load(self, pid: Any) -> torch.dtype | None:
        """The dtype of a storage; None where it is untyped, and the tensor says."""
        kind, dtype, key, _location, _numel = pid
        if kind != "storage" or str(key) != "0":
            raise DecodeError(f"the item refers to {pid!r}, not to its own storage")
        return dtype if isinstance(dtype, torch.dtype) else None


def _tensor_v2(
    storage_dtype: Any, offset: int, size: Any, stride: Any, grad: Any, hooks: Any, remarks: Any = None
) -> ItemLayout:
    return _tensor_v3(None, offset, size, stride, grad, hooks=hooks, dtype=storage_dtype, remarks=remarks)


def _tensor_v3(
    _storage: Any, offset: int, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, remarks: Any = None
) -> ItemLayout:
    """Where the raw bytes start is not known yet."""
    if not isinstance(dtype, torch.dtype):
        raise DecodeError("the item's tensor has no dtype")
    if remarks:  # {"conj": True}, {"neg": True}: the values are not what the bytes say
        raise DecodeError(
            f"the item's tensor is a lazy view ({', '.join(map(str, remarks))}): its values are not those of its bytes; save "
            "tensor.resolve_conj().resolve_neg()"
        )
    return ItemLayout(0, dtype, tuple(size), tuple(stride), int(offset))


def _parameter(data: ItemLayout, *_: Any) -> ItemLayout:
    return data


# How torch.save describes tensors of classes of their own: the first global of the description.
_CLASS_MAKERS = {
    ("torch._tensor", "_rebuild_from_type_v2"),
    ("torch._utils", "_rebuild_wrapper_subclass"),
    ("torch._utils", "_rebuild_qtensor"),
}

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
