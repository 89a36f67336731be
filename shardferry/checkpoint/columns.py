"""Columns of saved chunks and of stored items, one row each, and how they are compared in NumPy: no object per chunk."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain, repeat
from operator import is_
from typing import Any, TypeVar

import numpy as np

from shardferry.checkpoint.catalog import NO_FILE, ItemFormat, RawItem, TransformedItem
from shardferry.checkpoint.metadata import Metadata, MetadataIndex, StorageInfo, states_of
from shardferry.errors import CatalogError
from shardferry.region import row_major_strides

NO_ITEM = -1  # no item holds the chunk
NO_KEY = -1  # the metadata does not have the key
# Raised by values of a pickle where integers, strings and dicts are expected.
MALFORMED = (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError)

_PLAIN_FIELDS = 3  # of a StorageInfo: file, offset, length; more fields say how the item was written
_MAX_CORNERS = 2**63  # of a tensor, so that each corner has a number of 64 bits

# Where an item's bytes are. Path and format are numbers; path is NO_FILE where there is no item.
PLACE = np.dtype([("path", "i8"), ("byte_offset", "i8"), ("byte_length", "i8"), ("format", "i2")], align=True)

T = TypeVar("T", bound=Hashable)


class Numbers(dict[T, int]):
    """Gives each new key the next number."""

    def __missing__(self, key: T) -> int:
        return self.setdefault(key, len(self))


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


class Shapes:
    """The shapes of some tensors, to compare boxes with.

    Args:
        shapes: each one `is_possible`. The argument ``tensor`` of the methods has an index into them for each row.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        self._dims = RaggedArray.from_rows(shapes)
        self._strides = RaggedArray.from_rows([_corner_strides(shape) for shape in shapes])

    def contain(self, tensor: np.ndarray, corner: RaggedArray) -> np.ndarray:
        """Whether each corner is inside its tensor or on its border: ``bool[num_rows]``."""
        found: np.ndarray = corner.lengths == self._dims.lengths[tensor]
        rows = np.flatnonzero(found)
        inside = corner if len(rows) == len(found) else corner.take(rows)
        lengths = self._dims.take(tensor[rows]).flat
        is_outside = (inside.flat < 0) | (inside.flat > lengths)
        found[rows] = RaggedArray(is_outside.astype(np.int64), inside.lengths).sums() == 0
        return found

    def numbers(self, tensor: np.ndarray, corner: RaggedArray) -> np.ndarray:
        """Each corner as one number, ``int64[num_rows]``: within a tensor, equal only for equal corners."""
        return RaggedArray(corner.flat * self._strides.take(tensor).flat, corner.lengths).sums()


@lru_cache(maxsize=4096)  # a model has few shapes
def is_possible(shape: tuple[int, ...]) -> bool:
    """Whether a tensor can have this shape, and its corners can be numbered with 64 bits."""
    return min(shape, default=0) >= 0 and math.prod(length + 1 for length in shape) < _MAX_CORNERS


@lru_cache(maxsize=4096)
def _corner_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return row_major_strides([length + 1 for length in shape])  # an empty box can begin at the end of a dimension


@dataclass(frozen=True, slots=True)
class ChunkColumns:
    """Some saved chunks, one row per chunk."""

    tensor: np.ndarray  # int64, a number for each tensor
    first: np.ndarray  # int64, the number of the box's first corner; see Shapes.numbers
    last: np.ndarray  # int64, of its last corner
    offsets: RaggedArray  # elements
    sizes: RaggedArray  # elements
    place: np.ndarray  # PLACE

    @classmethod
    def concatenate(cls, parts: Sequence[ChunkColumns]) -> ChunkColumns:
        """The chunks of all parts, sorted by tensor. Chunks of one tensor keep the order of the parts."""
        if len(parts) == 1:
            return parts[0]
        whole = cls(
            tensor=np.concatenate([part.tensor for part in parts]),
            first=np.concatenate([part.first for part in parts]),
            last=np.concatenate([part.last for part in parts]),
            offsets=RaggedArray.concatenate([part.offsets for part in parts]),
            sizes=RaggedArray.concatenate([part.sizes for part in parts]),
            place=np.concatenate([part.place for part in parts]),
        )
        return whole.take(np.argsort(whole.tensor, kind="stable"))

    def take(self, rows: np.ndarray) -> ChunkColumns:
        """The chunks with these indices, in this order."""
        boxes = self.offsets.take(rows), self.sizes.take(rows)
        return ChunkColumns(self.tensor[rows], self.first[rows], self.last[rows], *boxes, self.place[rows])

    def without_replicas(self) -> ChunkColumns:
        """One chunk for all equal boxes of a tensor: at the place of the first one, in the file of the first stored one."""
        box, first = _numbered(self.tensor, self.first, self.last)
        if len(first) == len(box):
            return self
        chosen, stored = first.copy(), np.flatnonzero(self.place["path"] != NO_FILE)[::-1]
        chosen[box[stored]] = stored  # NumPy keeps the last of several values for one index
        return self.take(chosen[np.argsort(first)])


def _numbered(*columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A number for each row, equal for equal rows, and the first row with each number."""
    order = np.lexsort(columns[::-1])  # stable
    is_new = np.zeros(len(order), dtype=bool)
    is_new[:1] = True
    for column in columns:
        is_new[1:] |= column[order][1:] != column[order][:-1]
    number = np.empty(len(order), dtype=np.int64)
    number[order] = np.cumsum(is_new) - 1
    return number, order[is_new]


@dataclass(frozen=True, slots=True)
class ItemColumns:
    """The stored items of one metadata file, one row per item: which box of which tensor, and where its bytes are."""

    key: np.ndarray  # int64, number of the key in this file; NO_KEY where the metadata has no such key
    is_object: np.ndarray  # bool: the item has no box
    offsets: RaggedArray  # of the box, elements
    place: np.ndarray  # PLACE

    @classmethod
    def take_from(
        cls, source: str, metadata: Metadata, paths: Numbers[str], formats: Numbers[ItemFormat]
    ) -> ItemColumns:
        """Take the table of stored items out of a metadata file, which frees most of what was unpickled.

        Args:
            source: the file, for error messages.
            paths, formats: their numbers; new ones are added.

        Raises:
            CatalogError: there is no such table, or an entry is malformed.
        """
        table, metadata.storage_data = metadata.storage_data, None
        if not isinstance(table, dict):
            raise CatalogError(f"{source}: holds no table of stored items; it was not written by a file-system writer")
        for kind in set(map(type, table)) - {MetadataIndex}:
            raise CatalogError(f"{source}: the storage table is keyed by {kind.__name__}, not MetadataIndex")
        key_numbers = {key: number for number, key in enumerate(metadata.state_dict_metadata)}
        try:
            boxes = states_of(table, MetadataIndex)
            fqns = _strings([box["fqn"] for box in boxes], "fqn")
            place = _places(states_of(table.values(), StorageInfo), paths, formats)
            offsets = [box.get("offset") for box in boxes]
            items = cls(
                key=np.fromiter(map(key_numbers.get, fqns, repeat(NO_KEY)), np.int64, len(boxes)),
                is_object=np.fromiter(map(is_, offsets, repeat(None)), np.bool_, len(boxes)),
                offsets=RaggedArray.from_rows([() if offset is None else offset for offset in offsets]),
                place=place,
            )
        except MALFORMED as error:
            raise CatalogError(f"{source}: an incomplete entry in the storage table ({error})") from error
        if len(negative := np.flatnonzero((place["byte_offset"] < 0) | (place["byte_length"] < 0))):
            fqn = boxes[int(negative[0])]["fqn"]
            _, byte_offset, byte_length, _ = place[negative[0]].tolist()
            raise CatalogError(f"{source}: {fqn}: item at byte {byte_offset} with {byte_length} bytes")
        return items

    def rows_of(self, numbers: np.ndarray, shapes: Shapes, *, tensor: np.ndarray, first: np.ndarray) -> np.ndarray:
        """The row of the item that holds each chunk, or NO_ITEM: ``int64[num_chunks]``.

        Args:
            numbers, shapes: of the keys of some tensors, ascending; ``tensor`` has an index into them for each chunk.
            first: of each chunk, the number of its first corner.
        """
        rows = np.flatnonzero(~self.is_object & np.isin(self.key, numbers))
        rows = rows[shapes.contain(np.searchsorted(numbers, self.key[rows]), self.offsets.take(rows))]
        item_tensor = np.searchsorted(numbers, self.key[rows])
        item_first = shapes.numbers(item_tensor, self.offsets.take(rows))
        tensors, corners = np.concatenate([tensor, item_tensor]), np.concatenate([first, item_first])
        corner, _ = _numbered(tensors, corners)
        item_at = np.full(len(corner), NO_ITEM, dtype=np.int64)
        item_at[corner[len(tensor) :]] = rows  # the last one of several
        found: np.ndarray = item_at[corner[: len(tensor)]]
        return found


def _strings(values: Collection[Any], what: str) -> Collection[str]:
    for kind in set(map(type, values)) - {str}:
        raise TypeError(f"a {what} is a {kind.__name__}")
    return values


def _places(infos: Sequence[dict[str, Any]], paths: Numbers[str], formats: Numbers[ItemFormat]) -> np.ndarray:
    names = _strings([info["relative_path"] for info in infos], "relative_path")
    place = np.zeros(len(infos), PLACE)
    place["path"] = np.fromiter(map(paths.__getitem__, names), np.int64, len(infos))
    place["byte_offset"] = np.fromiter([info["offset"] for info in infos], np.int64, len(infos))
    place["byte_length"] = np.fromiter([info["length"] for info in infos], np.int64, len(infos))
    for row in [row for row, num_fields in enumerate(map(len, infos)) if num_fields != _PLAIN_FIELDS]:
        if infos[row].get("is_raw"):
            place["format"][row] = formats[RawItem()]
        elif descriptors := infos[row].get("transform_descriptors"):
            place["format"][row] = formats[TransformedItem(tuple(_strings(list(descriptors), "transform")))]
    return place
