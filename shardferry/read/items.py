"""Look up saved items in the catalog, find the positions of their elements, and decode saved Python objects."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from shardferry.checkpoint.catalog import NO_FILE, Catalog, ItemFormat, KnownValue, RawItem, TransformedItem, ZipItem
from shardferry.errors import DecodeError
from shardferry.read.objects import ForeignClass, decode_object
from shardferry.read.transforms import undo_transforms
from shardferry.read.zip_header import (
    HEADER_BYTES,
    MAX_HEADER_BYTES,
    HeaderTooShort,
    ItemLayout,
    QuantisedState,
    parse_header,
)
from shardferry.region import row_major_strides
from shardferry.storage.base import ByteReader

_USUAL_RAW_START = 704  # bytes; where torch.save puts a tensor's data
_USUAL_TAIL = range(768, 1024)  # bytes that torch.save writes after the data


@dataclass(frozen=True, slots=True)
class StoredItem:
    """One saved chunk or Python object, and where it is stored."""

    key: str
    path: str
    byte_offset: int  # in the file
    byte_length: int
    format: ItemFormat

    @property
    def is_ranged(self) -> bool:
        """Whether parts of it can be read without the rest."""
        return not isinstance(self.format, TransformedItem | KnownValue)

    @property
    def byte_stop(self) -> int:
        """Where it ends in the file, exclusive."""
        return self.byte_offset + self.byte_length

    def damaged(self, what: str) -> DecodeError:
        """The error for an item that contradicts the metadata."""
        return DecodeError(f"{self.key}: item at byte {self.byte_offset} of {self.path}: {what}; the file is damaged")


@dataclass(frozen=True, slots=True)
class TensorItem(StoredItem):
    """One saved chunk of a tensor, as the metadata describes it."""

    dtype: torch.dtype
    shape: tuple[int, ...]  # of the chunk


def tensor_item(catalog: Catalog, *, key: str, dtype: torch.dtype, shape: tuple[int, ...], chunk: int) -> TensorItem:
    """The item of a stored chunk.

    Args:
        shape: of the chunk.
        chunk: row of the catalog.
    """
    return TensorItem(
        key=key,
        path=catalog.files[catalog.chunk_file[chunk]],
        byte_offset=int(catalog.chunk_byte_offset[chunk]),
        byte_length=int(catalog.chunk_byte_length[chunk]),
        format=catalog.formats[catalog.chunk_format[chunk]],
        dtype=dtype,
        shape=shape,
    )


def object_item(catalog: Catalog, key: str) -> StoredItem:
    """The item of a saved Python object."""
    saved = catalog.objects[key]
    return StoredItem(key, catalog.files[saved.file], saved.byte_offset, saved.byte_length, saved.format)


def items_of(catalog: Catalog, key: str) -> Iterator[StoredItem]:
    """All stored items of a key."""
    if key in catalog.objects:
        yield object_item(catalog, key)
        return
    saved = catalog.tensors[key]
    sizes = catalog.boxes(saved)[1].tolist()
    for chunk, shape in zip(saved.chunks, sizes, strict=True):
        if catalog.chunk_file[chunk] != NO_FILE:
            yield tensor_item(catalog, key=key, dtype=saved.dtype, shape=tuple(shape), chunk=chunk)


def expected_layout(item: TensorItem) -> ItemLayout | None:
    """The layout that an item's length suggests. Only raw items have no header that could contradict it.

    None: the length is not that of a contiguous tensor as ``torch.save`` writes it.
    """
    if isinstance(item.format, RawItem):
        return _row_major(item, 0)
    nbytes = math.prod(item.shape) * item.dtype.itemsize
    is_usual = isinstance(item.format, ZipItem) and item.byte_length - _USUAL_RAW_START - nbytes in _USUAL_TAIL
    return _row_major(item, _USUAL_RAW_START) if is_usual else None


def assumed_layout(item: TensorItem) -> ItemLayout:
    """The layout to count with where nothing is read: the expected one, or row-major after an ordinary header."""
    return expected_layout(item) or _row_major(item, _USUAL_RAW_START)


def _row_major(item: TensorItem, raw_start: int) -> ItemLayout:
    return ItemLayout(raw_start, item.dtype, item.shape, row_major_strides(item.shape), 0)


class ItemLayouts:
    """Parses items' headers. Equal headers (same shape, same dtype) are parsed once and give the same object.

    Safe to use from several threads.
    """

    def __init__(self) -> None:
        self.header_bytes = HEADER_BYTES  # that hold every header so far: writers that align records widely always do
        self._parsed: dict[bytes, ItemLayout] = {}
        self._raw: dict[tuple[torch.dtype, tuple[int, ...]], ItemLayout] = {}
        self._header_lengths: tuple[int, ...] = ()
        self._checked: set[tuple[int, torch.dtype, tuple[int, ...], int]] = set()

    def layout(self, item: TensorItem, content: bytes | memoryview) -> ItemLayout:
        """The layout of a tensor's item.

        Args:
            content: of the item, from its start; all of it, decoded, where the item is transformed.

        Raises:
            HeaderTooShort: the header goes on after ``content``.
            QuantisedState: the item is whole, and of a class of its own.
            DecodeError: the item is damaged, or not the one that the metadata describes.
        """
        num_bytes = item.byte_length if item.is_ranged else len(content)
        if isinstance(item.format, RawItem):
            layout = self._raw.setdefault((item.dtype, item.shape), _row_major(item, 0))
        else:
            layout = self._header(item, content)
        same = (id(layout), item.dtype, item.shape, num_bytes)
        if same not in self._checked:
            _check_layout(item, layout, num_bytes)
            self._checked.add(same)
        return layout

    def _header(self, item: TensorItem, content: bytes | memoryview) -> ItemLayout:
        for length in self._header_lengths:
            if layout := self._parsed.get(bytes(content[:length])):
                return layout
        header = bytes(content[:HEADER_BYTES])
        while True:
            try:
                layout = parse_header(header)
                break
            except HeaderTooShort:
                if len(header) >= min(item.byte_length, MAX_HEADER_BYTES) and len(header) == len(content):
                    raise item.damaged(f"its header does not end within {len(header)} bytes") from None
                if len(header) == len(content):
                    raise
                header = bytes(content[: 2 * len(header)])
            except QuantisedState as error:
                raise QuantisedState(f"{item.key}: item at byte {item.byte_offset} of {item.path}: {error}") from error
            except DecodeError as error:
                raise item.damaged(str(error)) from error
        self.header_bytes = max(self.header_bytes, len(header))
        layout = self._parsed.setdefault(header[: layout.raw_start], layout)
        if layout.raw_start not in self._header_lengths:
            self._header_lengths = (*self._header_lengths, layout.raw_start)
        return layout


def read_layout(item: TensorItem, storage: ByteReader, layouts: ItemLayouts, *, known_bytes: int = 0) -> ItemLayout:
    """Read an item's header, however long it is, and parse it.

    Args:
        known_bytes: that are known not to hold the whole header.

    Raises:
        StorageError, DecodeError: the item is short or damaged.
    """
    num_bytes = max(2 * known_bytes, layouts.header_bytes)
    while True:
        header = read_item(item, storage, min(num_bytes, item.byte_length))
        try:
            return layouts.layout(item, header)
        except HeaderTooShort:
            num_bytes *= 2


def read_item(item: StoredItem, storage: ByteReader, num_bytes: int) -> memoryview:
    """The first bytes of an item, as they are stored. Raises StorageError."""
    data = memoryview(bytearray(num_bytes))
    storage.read_into(item.path, item.byte_offset, data)
    return data


def decoded(item: StoredItem, data: bytes | memoryview) -> bytes | memoryview:
    """A whole item as ``torch.save`` wrote it: transformations of its stream are undone. Raises DecodeError."""
    if not isinstance(item.format, TransformedItem):
        return data
    try:
        return undo_transforms(bytes(data), item.format.descriptors)
    except DecodeError as error:
        raise DecodeError(f"{item.key}: item at byte {item.byte_offset} of {item.path}: {error}") from error


def value_of(item: StoredItem, data: bytes | memoryview) -> Any:
    """A saved Python object.

    Args:
        data: the whole item as it is stored; unused where the value was known when the checkpoint was opened.

    Raises:
        ForeignClass: it holds a type that is not plain data.
        DecodeError: the item is damaged.
    """
    if isinstance(item.format, KnownValue):
        return copy.deepcopy(item.format.value)  # an optimizer counts its steps in place
    try:
        return decode_object(bytes(decoded(item, data)))
    except ForeignClass as error:
        raise ForeignClass(f"{item.key}: {item.path} at byte {item.byte_offset}: {error}", error.names) from error
    except DecodeError as error:
        raise DecodeError(f"{item.key}: {item.path} at byte {item.byte_offset}: {error}") from error


def _check_layout(item: TensorItem, layout: ItemLayout, num_bytes: int) -> None:
    """Compare a layout with the metadata and with the number of bytes. Raises DecodeError."""
    if layout.shape != item.shape or layout.dtype != item.dtype:
        raise item.damaged(
            f"it holds {layout.dtype} of shape {layout.shape}, the metadata says {item.dtype} of shape {item.shape}"
        )
    strides = layout.strides
    if layout.storage_offset < 0 or any(stride < 0 for stride in strides) or len(strides) != len(item.shape):
        raise item.damaged(f"its strides {strides} from {layout.storage_offset} on make no tensor of {item.shape}")
    last = layout.byte_position(tuple(n - 1 for n in item.shape)) + layout.dtype.itemsize
    if last > num_bytes and 0 not in item.shape:
        raise item.damaged(f"its data ends at byte {last} of an item of {num_bytes} bytes")
