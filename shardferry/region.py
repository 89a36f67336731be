"""Boxes of integers: intersect them, subtract them, and say how much they cover.

A region is half-open in every dimension. In one dimension::

    saved   |0 1 2 3|4 5 6 7|        2 chunks of 4
    wanted  |0 1 2 3 4 5|6 7|        ranks own 6 and 2
    pieces  |0 1 2 3|4 5|6 7|        3 intersections
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, order=True)
class Region:
    """A box in a tensor's index space: ``offsets[d] <= index[d] < offsets[d] + sizes[d]``. 0-dim boxes hold one element."""

    offsets: tuple[int, ...]  # elements
    sizes: tuple[int, ...]  # elements

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Region:
        """The region that covers a tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(o + s for o, s in zip(self.offsets, self.sizes, strict=True))

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    def intersect(self, other: Region) -> Region | None:
        """The common box, or None where the two share no element."""
        starts = tuple(map(max, self.offsets, other.offsets))
        sizes = tuple(min(a, b) - s for a, b, s in zip(self.ends, other.ends, starts, strict=True))
        return Region(starts, sizes) if all(size > 0 for size in sizes) else None

    def relative_to(self, offsets: Sequence[int]) -> Region:
        """The same box, counted from ``offsets`` instead of from the origin."""
        return Region(tuple(a - b for a, b in zip(self.offsets, offsets, strict=True)), self.sizes)

    def subtract(self, other: Region) -> list[Region]:
        """Disjoint boxes that hold every element of this box that is not in ``other``."""
        common = self.intersect(other)
        if common is None:
            return [self] if self.numel else []
        rest: list[Region] = []
        offsets, sizes = list(self.offsets), list(self.sizes)
        for dim in range(len(sizes)):
            before = common.offsets[dim] - offsets[dim]
            after = offsets[dim] + sizes[dim] - common.ends[dim]
            if before:
                rest.append(Region(tuple(offsets), (*sizes[:dim], before, *sizes[dim + 1 :])))
            if after:
                start = (*offsets[:dim], common.ends[dim], *offsets[dim + 1 :])
                rest.append(Region(start, (*sizes[:dim], after, *sizes[dim + 1 :])))
            offsets[dim], sizes[dim] = common.offsets[dim], common.sizes[dim]
        return rest

    def __str__(self) -> str:
        return "[" + ", ".join(f"{o}:{e}" for o, e in zip(self.offsets, self.ends, strict=True)) + "]"


@dataclass(frozen=True, slots=True)
class BoxCopy:
    """One copy: a box of a saved chunk, and where it goes in a rank's local tensor."""

    source: Region  # in the chunk, elements
    offset: int  # elements, from the start of the local tensor
    strides: tuple[int, ...]  # elements of the local tensor, one step in each dimension of `source`

    def within(self, dim: int, start: int, stop: int) -> BoxCopy | None:
        """The part of the copy between two positions of one dimension of the chunk; None where there is none."""
        first = self.source.offsets[dim]
        begin, end = max(start, first), min(stop, first + self.source.sizes[dim])
        if begin >= end:
            return None
        offsets = (*self.source.offsets[:dim], begin, *self.source.offsets[dim + 1 :])
        sizes = (*self.source.sizes[:dim], end - begin, *self.source.sizes[dim + 1 :])
        return BoxCopy(Region(offsets, sizes), self.offset + (begin - first) * self.strides[dim], self.strides)


def row_major_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of a contiguous tensor of this shape."""
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * max(shape[dim + 1], 1)
    return tuple(strides)


def uncovered(wanted: Region, saved: Iterable[Region]) -> list[Region]:
    """Boxes of ``wanted`` that no region of ``saved`` covers, in ascending order."""
    rest = [wanted] if wanted.numel else []
    for region in saved:
        rest = [part for box in rest for part in box.subtract(region)]
    return sorted(rest)


def tile(offsets: np.ndarray, sizes: np.ndarray, whole: Region) -> bool:
    """Whether some boxes hold each element of ``whole`` exactly once.

    Args:
        offsets, sizes: ``int64[n, ndim]``, elements, of boxes inside ``whole`` that have elements.

    How often an element is covered, modulo 2, follows from which points are corners of an odd number of boxes. Where these
    are the corners of ``whole`` alone, each element is covered an odd number of times; where the boxes hold as many
    elements as ``whole`` does, that is once. No box is compared with another: O(n log n).
    """
    if int(np.prod(sizes, axis=1, dtype=np.int64).sum()) != whole.numel:
        return False
    if len(sizes) < 2 or not whole.sizes:
        return len(sizes) == bool(whole.numel)
    strides = row_major_strides([size + 1 for size in whole.sizes])
    if strides[0] * (whole.sizes[0] + 1) >= 1 << 62:  # corners have no number
        return first_overlap(offsets, sizes) is None
    starts = offsets - np.array(whole.offsets, dtype=np.int64)
    corners, outer = np.zeros(len(sizes), dtype=np.int64), np.zeros(1, dtype=np.int64)
    for dim, stride in enumerate(strides):
        corners = np.concatenate([corners + starts[:, dim] * stride, corners + (starts + sizes)[:, dim] * stride])
        outer = np.concatenate([outer, outer + whole.sizes[dim] * stride])
        starts, sizes = np.concatenate([starts, starts]), np.concatenate([sizes, sizes])
    points, counts = np.unique(corners, return_counts=True)
    return np.array_equal(points[counts % 2 == 1], np.sort(outer))


def first_overlap(offsets: np.ndarray, sizes: np.ndarray) -> tuple[int, int] | None:
    """The first two of ``n`` boxes that share an element, or None.

    Args:
        offsets, sizes: ``int64[n, ndim]``, elements. Empty boxes share nothing.

    Cost: boxes are swept along the dimension with the most different offsets, so that only neighbours are compared;
    the usual chunk grid takes O(n log n).
    """
    filled = np.flatnonzero((sizes > 0).all(axis=1))
    if len(filled) < 2:
        return None
    if offsets.shape[1] == 0:
        return int(filled[0]), int(filled[1])
    offsets, ends = offsets[filled], (offsets + sizes)[filled]
    dim = int(np.argmax([len(np.unique(offsets[:, d])) for d in range(offsets.shape[1])]))
    order = np.argsort(offsets[:, dim], kind="stable")
    offsets, ends = offsets[order], ends[order]
    last = np.searchsorted(offsets[:, dim], ends[:, dim], side="left")  # first box that starts after this one ends
    for i in np.flatnonzero(last > np.arange(len(order)) + 1):
        rivals = slice(i + 1, last[i])
        shared = (np.minimum(ends[rivals], ends[i]) > np.maximum(offsets[rivals], offsets[i])).all(axis=1)
        if shared.any():
            j = int(i + 1 + np.argmax(shared))
            return tuple(sorted((int(filled[order[i]]), int(filled[order[j]]))))  # type: ignore[return-value]
    return None
