"""Columns of saved chunks and of stored items, one row each, and how they are compared in NumPy: no object per chunk."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from itertools import chain, islice, repeat
from operator import is_
from typing import Any

import numpy as np

from shardferry.checkpoint.catalog import NO_FILE, ItemFormat, RawItem, TransformedItem, ZipItem
from shardferry.checkpoint.metadata import Metadata, MetadataIndex, StorageInfo
from shardferry.errors import CatalogError

NO_ITEM = -1  # no item holds the chunk
NO_KEY = -1  # the metadata does not have the key
# Raised by values of a pickle where integers, strings and dicts are expected.
MALFORMED = (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError)

_PLAIN_FIELDS = 3  # of a StorageInfo: file, offset, length; more fields say how the item was written
_MAX_CORNERS = 2**63  # of a tensor, so that each corner has a number of 64 bits


@dataclass(frozen=True)
class RaggedArray:
    """Rows of integers of different lengths: row ``i`` is ``flat[starts[i] : starts[i] + lengths[i]]``.

    ::

        rows     (0, 4) () (7)
        flat     0 4 7
        lengths  2 0 1
        starts   0 2 2
    """

    flat: np.ndarray  # int64
    lengths: np.ndarray  # int64[num_rows]

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[int]]) -> RaggedArray:
        """Convert rows. Raises TypeError, ValueError, OverflowError where a row is not a sequence of 64-bit integers."""
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        return cls(np.fromiter(chain.from_iterable(rows), np.int64, int(lengths.sum())), lengths)

    @classmethod
    def concatenate(cls, parts: Sequence[RaggedArray]) -> RaggedArray:
        """The rows of all parts, one part after another."""
        return cls(np.concatenate([p.flat for p in parts]), np.concatenate([p.lengths for p in parts]))

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def starts(self) -> np.ndarray:
        """Index in ``flat`` of each row's first entry, ``int64[num_rows]``."""
        starts: np.ndarray = np.cumsum(self.lengths) - self.lengths
        return starts

    def row(self, index: int) -> tuple[int, ...]:
        """One row, as Python integers."""
        start = int(self.starts[index])
        return tuple(self.flat[start : start + int(self.lengths[index])].tolist())

    def take(self, rows: np.ndarray) -> RaggedArray:
        """The rows with these indices, in this order; an index may occur several times."""
        lengths = self.lengths[rows]
        shifts = np.repeat(self.starts[rows] - (np.cumsum(lengths) - lengths), lengths)
        return RaggedArray(self.flat[np.arange(len(shifts)) + shifts], lengths)

    def sums(self) -> np.ndarray:
        """The sum of each row, ``int64[num_rows]``."""
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.flat)])
        sums: np.ndarray = before[self.starts + self.lengths] - before[self.starts]
        return sums

    def any_of(self, marks: np.ndarray) -> np.ndarray:
        """Whether a row has a marked entry, ``bool[num_rows]``.

        Args:
            marks: ``bool[num_entries]``, one for each entry of ``flat``.
        """
        marked: np.ndarray = RaggedArray(marks.astype(np.int64), self.lengths).sums() > 0
        return marked


class Shapes:
    """The shapes of some tensors, to compare boxes with.

    Args:
        shapes: each one `is_possible`. The argument ``tensor`` of the methods has an index into them for each row.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        self._dims = RaggedArray.from_rows(shapes)
        self._strides = RaggedArray.from_rows([_corner_strides(shape) for shape in shapes])

    def contain(self, tensor: np.ndarray, offsets: RaggedArray, sizes: RaggedArray) -> np.ndarray:
        """Whether each box is inside its tensor: ``bool[num_rows]``.

        If a box has another number of dimensions than its tensor, only such boxes are reported.
        """
        num_dims = self._dims.lengths[tensor]
        fits: np.ndarray = (offsets.lengths == num_dims) & (sizes.lengths == num_dims)
        if not fits.all():
            return fits  # the rest can't be compared entry by entry, and one bad box is enough for an error
        lengths = self._dims.take(tensor).flat
        outside = (
            (offsets.flat < 0) | (sizes.flat < 0) | (offsets.flat > lengths) | (sizes.flat > lengths - offsets.flat)
        )
        return ~offsets.any_of(outside)

    def have_corner(self, tensor: np.ndarray, offsets: RaggedArray) -> np.ndarray:
        """Whether a box of its tensor can begin at each row of offsets: ``bool[num_rows]``."""
        found: np.ndarray = offsets.lengths == self._dims.lengths[tensor]
        rows = np.flatnonzero(found)
        begin, lengths = offsets.take(rows), self._dims.take(tensor[rows]).flat
        found[rows] = ~begin.any_of((begin.flat < 0) | (begin.flat > lengths))
        return found

    def corners(self, tensor: np.ndarray, offsets: RaggedArray) -> np.ndarray:
        """Each row of offsets as one number, ``int64[num_rows]``: within a tensor, equal only for equal offsets."""
        return RaggedArray(offsets.flat * self._strides.take(tensor).flat, offsets.lengths).sums()


@lru_cache(maxsize=4096)  # a model has few shapes
def is_possible(shape: tuple[int, ...]) -> bool:
    """Whether a tensor can have this shape, and its corners can be numbered with 64 bits."""
    return min(shape, default=0) >= 0 and _num_corners(shape) < _MAX_CORNERS


@lru_cache(maxsize=4096)
def _corner_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(_num_corners(shape[dim + 1 :]) for dim in range(len(shape)))


def _num_corners(shape: tuple[int, ...]) -> int:
    """Positions at which a box can begin; an empty box can begin at the end of a dimension."""
    return math.prod(length + 1 for length in shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkColumns:
    """Some saved chunks, one row per chunk."""

    tensor: np.ndarray  # int64, a number for each tensor
    corner: np.ndarray  # int64, where the box begins; see Shapes.corners
    end: np.ndarray  # int64, where the box ends, numbered in the same way
    offsets: RaggedArray  # elements
    sizes: RaggedArray  # elements
    path: np.ndarray  # int64, a number for each path of a file, or NO_FILE
    byte_offset: np.ndarray  # int64, of the item in its file
    byte_length: np.ndarray  # int64, of the item
    format: np.ndarray  # int16, a number for each format

    @classmethod
    def concatenate(cls, parts: Sequence[ChunkColumns]) -> ChunkColumns:
        """The chunks of all parts, sorted by tensor. Chunks of one tensor keep the order of the parts."""
        if len(parts) == 1:
            return parts[0]
        joined: dict[str, Any] = {}
        for field in fields(cls):
            columns = [getattr(part, field.name) for part in parts]
            is_ragged = isinstance(columns[0], RaggedArray)
            joined[field.name] = RaggedArray.concatenate(columns) if is_ragged else np.concatenate(columns)
        whole = cls(**joined)
        return whole.take(np.argsort(whole.tensor, kind="stable"))

    def take(self, rows: np.ndarray) -> ChunkColumns:
        """The chunks with these indices, in this order."""
        taken: dict[str, Any] = {}
        for field in fields(self):
            column = getattr(self, field.name)
            taken[field.name] = column.take(rows) if isinstance(column, RaggedArray) else column[rows]
        return ChunkColumns(**taken)

    def without_replicas(self) -> ChunkColumns:
        """One chunk for all equal boxes of a tensor: at the place of the first one, in the file of the first stored one."""
        order = np.lexsort((self.end, self.corner, self.tensor))  # stable: equal boxes keep their order
        is_replica = _equals_previous_row(self.tensor[order], self.corner[order], self.end[order])
        if not is_replica.any():
            return self
        first = order[~is_replica]
        is_stored = self.path[order] != NO_FILE
        box, rows = (np.cumsum(~is_replica) - 1)[is_stored], order[is_stored]
        chosen = first.copy()
        chosen[box[::-1]] = rows[::-1]  # NumPy keeps the last of several values for one index
        return self.take(chosen[np.argsort(first)])


def _equals_previous_row(*columns: np.ndarray) -> np.ndarray:
    """Whether each row equals the row before it in all columns; False for the first one."""
    equal = np.ones(len(columns[0]), dtype=bool)
    equal[:1] = False
    for column in columns:
        equal[1:] &= column[1:] == column[:-1]
    return equal


def items_at(tensor: np.ndarray, corner: np.ndarray, *, item_tensor: np.ndarray, item_corner: np.ndarray) -> np.ndarray:
    """Find the item of each chunk: the last one of the same tensor with the same corner.

    Args:
        tensor, corner: of each chunk, ``int64[num_chunks]``.
        item_tensor, item_corner: of each item, ``int64[num_items]``.

    Returns:
        ``int64[num_chunks]``: row of the item, or NO_ITEM.
    """
    num_chunks = len(tensor)
    tensors, corners = np.concatenate([tensor, item_tensor]), np.concatenate([corner, item_corner])
    order = np.lexsort((corners, tensors))
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.cumsum(~_equals_previous_row(tensors[order], corners[order]))
    item_at = np.full(len(order) + 1, NO_ITEM, dtype=np.int64)
    item_at[place[num_chunks:]] = np.arange(len(item_tensor))
    return item_at[place[:num_chunks]]


class NameTable:
    """Numbers for the paths and formats of the items of all metadata files of a checkpoint."""

    def __init__(self) -> None:
        self._paths: dict[str, int] = {}
        self._formats: dict[ItemFormat, int] = {ZipItem(): 0}

    @property
    def paths(self) -> list[str]:
        """By number, as the metadata writes them."""
        return list(self._paths)

    @property
    def formats(self) -> list[ItemFormat]:
        """By number."""
        return list(self._formats)

    def number_paths(self, paths: Sequence[Any]) -> np.ndarray:
        """The number of each path, ``int64[num_paths]``."""
        numbers = {path: self._paths.setdefault(str(path), len(self._paths)) for path in dict.fromkeys(paths)}
        return np.fromiter(map(numbers.__getitem__, paths), np.int64, len(paths))

    def number_formats(self, states: Sequence[dict[str, Any]]) -> np.ndarray:
        """The number of each item's format, ``int16[num_items]``. Raises TypeError where descriptors are not a list."""
        formats = np.zeros(len(states), dtype=np.int16)
        for row in [row for row, num_fields in enumerate(map(len, states)) if num_fields != _PLAIN_FIELDS]:
            formats[row] = self._formats.setdefault(_format_of(states[row]), len(self._formats))
        return formats


def _format_of(state: dict[str, Any]) -> ItemFormat:
    if state.get("is_raw"):
        return RawItem()
    descriptors = state.get("transform_descriptors")
    return TransformedItem(tuple(map(str, descriptors))) if descriptors else ZipItem()


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemColumns:
    """The stored items of one metadata file, one row per item: which box of which tensor, and where its bytes are."""

    key: np.ndarray  # int64, number of the key in this file; NO_KEY where the metadata has no such key
    is_object: np.ndarray  # bool: the item has no box
    offsets: RaggedArray  # of the box, elements
    path: np.ndarray  # int64, number in NameTable
    byte_offset: np.ndarray  # int64
    byte_length: np.ndarray  # int64
    format: np.ndarray  # int16, number in NameTable

    @classmethod
    def take_from(cls, source: str, metadata: Metadata, names: NameTable) -> ItemColumns:
        """Take the table of stored items out of a metadata file, which frees most of what was unpickled.

        Args:
            source: the file, for error messages.
            names: numbers the paths and formats.

        Raises:
            CatalogError: there is no such table, or an entry is malformed.
        """
        table, metadata.storage_data = metadata.storage_data, None
        if not isinstance(table, dict):
            raise CatalogError(f"{source}: holds no table of stored items; it was not written by a file-system writer")
        for kind in set(map(type, table)) - {MetadataIndex}:
            raise CatalogError(f"{source}: the storage table is keyed by {kind.__name__}, not MetadataIndex")
        try:
            key_numbers = {key: number for number, key in enumerate(metadata.state_dict_metadata)}
            items = cls._from_rows(list(table), list(table.values()), names, key_numbers)
        except MALFORMED as error:
            raise CatalogError(f"{source}: an incomplete entry in the storage table ({error})") from error
        if len(negative := np.flatnonzero((items.byte_offset < 0) | (items.byte_length < 0))):
            row = int(negative[0])
            fqn = next(islice(table, row, None))[0]["fqn"]
            raise CatalogError(
                f"{source}: {fqn}: item at byte {items.byte_offset[row]} with {items.byte_length[row]} bytes"
            )
        return items

    @classmethod
    def _from_rows(
        cls,
        indices: Sequence[MetadataIndex],
        infos: Sequence[StorageInfo],
        names: NameTable,
        key_numbers: Mapping[Any, int],
    ) -> ItemColumns:
        for kind in set(map(type, infos)) - {StorageInfo}:
            raise TypeError(f"it is a {kind.__name__}")
        num_items = len(infos)
        boxes, places = [index[0] for index in indices], [info[0] for info in infos]
        fqns, offsets = [box["fqn"] for box in boxes], [box.get("offset") for box in boxes]
        is_object = np.fromiter(map(is_, offsets, repeat(None)), np.bool_, num_items)
        rows = [() if box is None else box for box in offsets] if is_object.any() else offsets
        return cls(
            key=np.fromiter(map(key_numbers.get, fqns, repeat(NO_KEY)), np.int64, num_items),
            is_object=is_object,
            offsets=RaggedArray.from_rows(rows),
            path=names.number_paths([place["relative_path"] for place in places]),
            byte_offset=np.fromiter([place["offset"] for place in places], np.int64, num_items),
            byte_length=np.fromiter([place["length"] for place in places], np.int64, num_items),
            format=names.number_formats(places),
        )

    def objects(self) -> dict[int, int]:
        """Rows without a box, by the number of their key."""
        rows = np.flatnonzero(self.is_object)
        return dict(zip(self.key[rows].tolist(), rows.tolist(), strict=True))

    def rows_of(self, numbers: np.ndarray, shapes: Shapes, *, tensor: np.ndarray, corner: np.ndarray) -> np.ndarray:
        """The row of the item that holds each chunk, or NO_ITEM: ``int64[num_chunks]``.

        Args:
            numbers: of the keys of some tensors, ascending.
            shapes: of these tensors.
            tensor: of each chunk, an index into ``numbers``.
            corner: of each chunk.
        """
        item_tensor = np.searchsorted(numbers, self.key)
        known = np.flatnonzero(~self.is_object & np.isin(self.key, numbers))
        known = known[shapes.have_corner(item_tensor[known], self.offsets.take(known))]
        item_corner = shapes.corners(item_tensor[known], self.offsets.take(known))
        found = items_at(tensor, corner, item_tensor=item_tensor[known], item_corner=item_corner)
        rows: np.ndarray = np.append(known, NO_ITEM)[found]
        return rows
