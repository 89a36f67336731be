"""Turn saved boxes into columns, a row a chunk, in which equal boxes are found without an object a chunk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np

from shardferry.checkpoint.catalog import NO_FILE
from shardferry.checkpoint.ragged import Ragged

_MAX_CORNERS = 2**63  # of a tensor, so that each has a number of 64 bits


class Shapes:
    """Shapes of some tensors, to hold boxes against. Below, ``tensor`` names one of them for each row."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        self._dims = Ragged.of(shapes)
        self._strides = Ragged.of([_strides(shape) for shape in shapes])

    def holds(self, tensor: np.ndarray, offsets: Ragged, sizes: Ragged) -> np.ndarray:
        """For each row, whether the box lies inside its tensor: ``bool[num_rows]``."""
        num_dims = self._dims.lengths[tensor]
        fits: np.ndarray = (offsets.lengths == num_dims) & (sizes.lengths == num_dims)
        if not fits.all():
            return fits  # the rest is not comparable, and one that doesn't fit is enough
        lengths = self._dims.take(tensor).flat
        outside = (
            (offsets.flat < 0) | (sizes.flat < 0) | (offsets.flat > lengths) | (sizes.flat > lengths - offsets.flat)
        )
        return ~offsets.any_of(outside)

    def has_corner(self, tensor: np.ndarray, offsets: Ragged) -> np.ndarray:
        """For each row, whether a box of its tensor can begin there: ``bool[num_rows]``."""
        found: np.ndarray = offsets.lengths == self._dims.lengths[tensor]
        rows = np.flatnonzero(found)
        begin, lengths = offsets.take(rows), self._dims.take(tensor[rows]).flat
        found[rows] = ~begin.any_of((begin.flat < 0) | (begin.flat > lengths))
        return found

    def corners(self, tensor: np.ndarray, offsets: Ragged) -> np.ndarray:
        """Each row of offsets as one number, ``int64[num_rows]``: in one tensor, equal for equal offsets alone."""
        return Ragged(offsets.flat * self._strides.take(tensor).flat, offsets.lengths).sums()


@lru_cache(maxsize=4096)  # a model has few shapes
def is_possible(shape: tuple[int, ...]) -> bool:
    """Whether a tensor can have it, as far as its corners can be numbered."""
    return min(shape, default=0) >= 0 and _num_corners(shape) < _MAX_CORNERS


@lru_cache(maxsize=4096)
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(_num_corners(shape[dim + 1 :]) for dim in range(len(shape)))


def _num_corners(shape: tuple[int, ...]) -> int:
    """Places at which a box can begin; an empty one also at the end of a dimension."""
    return math.prod(length + 1 for length in shape)


@dataclass(frozen=True, slots=True)
class ChunkColumns:
    """Some saved chunks: one row a chunk in each column."""

    tensor: np.ndarray  # int64, a number for each tensor
    corner: np.ndarray  # int64, where its box begins; see Shapes.corners
    end: np.ndarray  # int64, where its box ends, alike
    offsets: Ragged  # elements
    sizes: Ragged  # elements
    path: np.ndarray  # int64, a number for each path of a file, or NO_FILE
    byte_offset: np.ndarray  # int64, of the item in its file
    byte_length: np.ndarray  # int64, of the item
    format: np.ndarray  # int16, a number for each format

    @classmethod
    def joined(cls, parts: Sequence[ChunkColumns]) -> ChunkColumns:
        """The chunks of all parts, tensor by tensor; those of one tensor in the order of the parts."""
        if len(parts) == 1:
            return parts[0]
        columns: list[list[Any]] = [[getattr(part, field.name) for part in parts] for field in fields(cls)]
        joined: list[Any] = [Ragged.joined(c) if isinstance(c[0], Ragged) else np.concatenate(c) for c in columns]
        whole = cls(*joined)
        return whole.take(np.argsort(whole.tensor, kind="stable"))

    def take(self, rows: np.ndarray) -> ChunkColumns:
        """Some chunks, in the order asked for."""
        columns = (getattr(self, field.name) for field in fields(self))
        taken: list[Any] = [c.take(rows) if isinstance(c, Ragged) else c[rows] for c in columns]
        return ChunkColumns(*taken)

    def without_replicas(self) -> ChunkColumns:
        """Of equal boxes of a tensor one: in the place of the first, stored as the first that is stored."""
        order = np.lexsort((self.end, self.corner, self.tensor))  # stable: equal boxes stay in their order
        is_replica = _is_as_before(self.tensor[order], self.corner[order], self.end[order])
        if not is_replica.any():
            return self
        first = order[~is_replica]
        is_stored = self.path[order] != NO_FILE
        box, rows = (np.cumsum(~is_replica) - 1)[is_stored], order[is_stored]
        chosen = first.copy()
        chosen[box[::-1]] = rows[::-1]  # of several values for one place the last stays
        return self.take(chosen[np.argsort(first)])


def items_at(tensor: np.ndarray, corner: np.ndarray, item_tensor: np.ndarray, item_corner: np.ndarray) -> np.ndarray:
    """For each chunk the row of the last item of the same tensor and corner, -1 where there is none."""
    num_chunks = len(tensor)
    tensors, corners = np.concatenate([tensor, item_tensor]), np.concatenate([corner, item_corner])
    order = np.lexsort((corners, tensors))
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.cumsum(~_is_as_before(tensors[order], corners[order]))
    item_at = np.full(len(order) + 1, -1, dtype=np.int64)
    item_at[place[num_chunks:]] = np.arange(len(item_tensor))
    return item_at[place[:num_chunks]]


def _is_as_before(*columns: np.ndarray) -> np.ndarray:
    """For each row, whether it is equal to the one before, in all columns; the first is not."""
    equal = np.ones(len(columns[0]), dtype=bool)
    equal[:1] = False
    for column in columns:
        equal[1:] &= column[1:] == column[:-1]
    return equal
