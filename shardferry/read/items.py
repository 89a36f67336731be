"""Turn the catalog's rows into stored items, and a stored item into the place and strides of its raw bytes.

However a writer laid an item down, the reader asks the same two questions:

* `ItemReader.layout`: where its elements are, from the item's start, so that ranges of it can be read in place;
* `ItemReader.content`: for what can't be read in ranges, the whole item as ``torch.save`` wrote it, in memory.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from shardferry.checkpoint.catalog import NO_FILE, Catalog, ItemFormat, KnownValue, RawItem, TransformedItem, ZipItem
from shardferry.errors import DecodeError
from shardferry.read.transforms import undo_transforms
from shardferry.read.zip_header import HEAD_BYTES, MAX_HEAD_BYTES, HeadTooShort, ItemLayout, decode_object, parse_head
from shardferry.region import row_major_strides
from shardferry.storage.base import ByteReader


@dataclass(frozen=True, slots=True)
class StoredItem:
    """One saved chunk or Python object, where it is stored."""

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
        """The error for an item that is not what it should be."""
        return DecodeError(f"{self.key}: item at byte {self.byte_offset} of {self.path}: {what}; the file is damaged")


@dataclass(frozen=True, slots=True)
class TensorItem(StoredItem):
    """One saved chunk of a tensor, as the metadata describes it."""

    dtype: torch.dtype
    shape: tuple[int, ...]  # of the chunk


def tensor_item(catalog: Catalog, key: str, dtype: torch.dtype, shape: tuple[int, ...], chunk: int) -> TensorItem:
    """The item of a stored chunk (a row of the catalog)."""
    return TensorItem(
        key,
        catalog.files[catalog.chunk_file[chunk]],
        int(catalog.chunk_byte_offset[chunk]),
        int(catalog.chunk_byte_length[chunk]),
        catalog.formats[catalog.chunk_format[chunk]],
        dtype,
        shape,
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
    for chunk in saved.chunks:
        if catalog.chunk_file[chunk] != NO_FILE:
            yield tensor_item(catalog, key, saved.dtype, tuple(sizes[chunk - saved.chunks.start]), chunk)


USUAL_RAW_START = 704  # bytes; where torch.save puts a tensor's data
_USUAL_TAIL = range(768, 1024)  # bytes; what it writes behind the data


def usual_layout(item: TensorItem) -> ItemLayout | None:
    """How an item most probably lies, by its length; only its own head says for sure. None: nothing can be said."""
    if not isinstance(item.format, ZipItem):
        return raw_layout(item) if isinstance(item.format, RawItem) else None
    nbytes = math.prod(item.shape) * item.dtype.itemsize
    if item.byte_length - USUAL_RAW_START - nbytes not in _USUAL_TAIL:
        return None
    return ItemLayout(USUAL_RAW_START, item.dtype, item.shape, row_major_strides(item.shape), 0)


def raw_layout(item: TensorItem) -> ItemLayout:
    """Of a tensor's raw bytes and nothing else."""
    return ItemLayout(0, item.dtype, item.shape, row_major_strides(item.shape), 0)


class ItemReader:
    """Looks into items. Equal heads (same shape, same dtype) are parsed once."""

    def __init__(self, source: ByteReader) -> None:
        self._source = source
        self._parsed: dict[bytes, ItemLayout] = {}
        self._head_lengths: set[int] = set()
        self._head_bytes = HEAD_BYTES  # to begin with; a writer that aligns records widely does so in all items

    def layout(self, item: TensorItem) -> ItemLayout:
        """Where the elements of a ranged item are, from its start. Raises StorageError, DecodeError."""
        return self._checked(item, lambda num_bytes: bytes(self._read(item, num_bytes)), item.byte_length)

    def is_as_expected(self, expected: ItemLayout, head: memoryview) -> bool:
        """Whether an item's head, which ends where the data is expected, says so too."""
        try:
            found = self._parse(bytes(head))
        except (HeadTooShort, DecodeError):  # whoever reads it again finds out
            return False
        return found == expected or _lie_alike(found, expected)

    def content(self, item: StoredItem) -> bytes:
        """The whole item as ``torch.save`` wrote it. Raises StorageError, DecodeError."""
        data = self._read(item, item.byte_length)
        if not isinstance(item.format, TransformedItem):
            return bytes(data)
        try:
            return undo_transforms(data, item.format.descriptors)
        except DecodeError as error:
            raise DecodeError(f"{item.key}: item at byte {item.byte_offset} of {item.path}: {error}") from error

    def layout_in(self, content: bytes | memoryview, item: TensorItem) -> ItemLayout:
        """Where the elements are in an item's content. Raises DecodeError."""
        return self._checked(item, lambda num_bytes: bytes(content[:num_bytes]), len(content))

    def _checked(self, item: TensorItem, head_of: Callable[[int], bytes], num_bytes: int) -> ItemLayout:
        layout = raw_layout(item) if isinstance(item.format, RawItem) else self._layout(item, head_of, num_bytes)
        _check_layout(item, layout, num_bytes)
        return layout

    def value(self, item: StoredItem) -> Any:
        """A saved Python object. Raises StorageError, DecodeError."""
        if isinstance(item.format, KnownValue):
            return copy.deepcopy(item.format.value)  # an optimizer counts its steps in place
        return self.value_in(self.content(item), item)

    def value_in(self, content: bytes | memoryview, item: StoredItem) -> Any:
        """A saved Python object, out of its item's content. Raises DecodeError."""
        try:
            return decode_object(bytes(content))
        except DecodeError as error:
            raise DecodeError(f"{item.key}: {item.path} at byte {item.byte_offset}: {error}") from error

    def _read(self, item: StoredItem, num_bytes: int) -> bytearray:
        data = bytearray(num_bytes)
        self._source.read_into(item.path, item.byte_offset, memoryview(data))
        return data

    def _layout(self, item: StoredItem, head_of: Callable[[int], bytes], num_bytes: int) -> ItemLayout:
        wanted = self._head_bytes
        while True:
            head = head_of(min(wanted, num_bytes))
            try:
                layout = self._parse(head)
            except HeadTooShort:
                if wanted >= min(num_bytes, MAX_HEAD_BYTES):
                    raise item.damaged(f"its header does not end within {len(head)} bytes") from None
                wanted *= 2
            except DecodeError as error:
                raise item.damaged(str(error)) from error
            else:
                self._head_bytes = wanted
                return layout

    def _parse(self, head: bytes) -> ItemLayout:
        for length in self._head_lengths:
            if layout := self._parsed.get(head[:length]):
                return layout
        layout = parse_head(head)
        self._parsed[head[: layout.raw_start]] = layout
        self._head_lengths = self._head_lengths | {layout.raw_start}  # a new set: other threads may be iterating
        return layout


def _lie_alike(one: ItemLayout, other: ItemLayout) -> bool:
    """Whether each element is at the same place: the stride of a dimension of size 1 says nothing."""
    strides = zip(one.shape, one.strides, other.strides, strict=True)
    return (
        (one.raw_start, one.storage_offset) == (other.raw_start, other.storage_offset)
        and (one.dtype, one.shape) == (other.dtype, other.shape)
        and all(size == 1 or a == b for size, a, b in strides)
    )


def _check_layout(item: TensorItem, layout: ItemLayout, num_bytes: int) -> None:
    """Hold a layout against the metadata, and against the bytes that there are."""
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
