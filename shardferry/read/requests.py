"""Turn a read item and the layout of its saved item into byte ranges: in-place reads, or a strided gather.

::

    chunk (4, 6) row-major, wanted [0:4, 0:6]   one run of 24 elements            -> InPlaceRead
    chunk (4, 6) row-major, wanted [0:4, 0:3]   4 runs of 3 elements, short       -> Gather through a window
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from shardferry.read.coalesce import JoinLimits
from shardferry.read.zip_header import ItemLayout
from shardferry.storage.base import ByteRuns, over_read_bytes

LONG_RUN = 64 * 1024  # bytes; where files are mapped, runs from this length on are read one by one


@dataclass(frozen=True, slots=True)
class InPlaceRead:
    """Bytes that go to the arena as they are."""

    byte_offset: int  # in the item
    arena_offset: int  # bytes
    nbytes: int


@dataclass(frozen=True, slots=True)
class Gather:
    """A strided copy out of a window of an item into the arena; all strides in elements."""

    window_start: int  # bytes, in the item
    window_stop: int  # bytes, in the item, exclusive
    sizes: tuple[int, ...]
    source_strides: tuple[int, ...]
    arena_offset: int  # bytes, of the first element
    strides: tuple[int, ...]
    itemsize: int

    @property
    def nbytes(self) -> int:
        """Bytes looked at; the window may be wider."""
        return math.prod(self.sizes) * self.itemsize

    @property
    def byte_offset(self) -> int:
        """Of the first byte, in the item."""
        return self.window_start

    @property
    def window_bytes(self) -> int:
        return self.window_stop - self.window_start

    def runs(self, item_offset: int) -> ByteRuns:
        """Where the bytes that are looked at lie in a file whose item starts at ``item_offset``."""
        packed = bool(self.sizes) and self.source_strides[-1] == 1
        dims = len(self.sizes) - packed
        return ByteRuns(
            start=item_offset + self.window_start,
            run_bytes=(self.sizes[-1] if packed else 1) * self.itemsize,
            counts=self.sizes[:dims],
            byte_strides=tuple(stride * self.itemsize for stride in self.source_strides[:dims]),
        )


Request = InPlaceRead | Gather


def brings_head(first: Request, head_bytes: int, limits: JoinLimits) -> bool:
    """Whether an item's head and the first request for its data are one request.

    Args:
        first: the one that starts first in the item.
        head_bytes: where the item's data starts.
    """
    gap = first.byte_offset - head_bytes
    nbytes = first.nbytes if isinstance(first, InPlaceRead) else first.window_bytes
    over_read = over_read_bytes(gap, free_gap_bytes=limits.free_gap_bytes)
    near = gap <= limits.max_gap_bytes and over_read <= limits.max_over_read * first.nbytes
    return near and first.byte_offset + nbytes <= limits.max_request_bytes


@dataclass(frozen=True, slots=True)
class StridedCopy:
    """A box on its way from an item to the arena, before it is cut into requests."""

    byte_offset: int  # of the first element, in the item
    arena_offset: int  # bytes
    sizes: tuple[int, ...]
    source_strides: tuple[int, ...]  # elements
    strides: tuple[int, ...]  # elements
    itemsize: int

    def normalized(self) -> StridedCopy:
        """The same copy with dimensions of size 1 dropped, the rest in the source's order, and contiguous ones joined."""
        dims = [d for d in zip(self.sizes, self.source_strides, self.strides, strict=True) if d[0] != 1]
        dims.sort(key=lambda d: -d[1])
        joined: list[tuple[int, int, int]] = []
        for size, source, target in dims:
            if joined and joined[-1][1:] == (source * size, target * size):
                joined[-1] = (joined[-1][0] * size, source, target)
            else:
                joined.append((size, source, target))
        sizes, sources, targets = zip(*joined, strict=True) if joined else ((), (), ())
        return StridedCopy(self.byte_offset, self.arena_offset, sizes, sources, targets, self.itemsize)

    def requests(self, limits: JoinLimits) -> Iterator[Request]:
        """Cut into requests, in ascending order of byte offset. The copy is a normalized one."""
        if 0 in self.sizes:
            return
        if self._is_contiguous() and len(self.sizes) <= 1:
            yield from self._in_place(limits.max_data_bytes)
            return
        gather = self._gather()
        apart = self._is_read_apart(gather, limits)
        if not apart and gather.window_bytes <= limits.max_data_bytes:
            yield gather
            return
        for part in self._parts(limits.max_data_bytes, single_rows=apart):
            yield from part.requests(limits)

    def _is_contiguous(self) -> bool:
        """Along the innermost dimension, there and here."""
        return not self.sizes or (self.source_strides[-1], self.strides[-1]) == (1, 1)

    def _run_bytes(self) -> int:
        return (self.sizes[-1] if self.sizes else 1) * self.itemsize

    def _in_place(self, max_request_bytes: int) -> Iterator[InPlaceRead]:
        run = self._run_bytes()
        for start in range(0, run, max_request_bytes):
            yield InPlaceRead(self.byte_offset + start, self.arena_offset + start, min(max_request_bytes, run - start))

    def _is_read_apart(self, gather: Gather, limits: JoinLimits) -> bool:
        """Whether rows are better read one by one than through one window."""
        if limits.maps_files:  # what is between the runs isn't read
            return self._is_contiguous() and self._run_bytes() >= LONG_RUN
        return not gather.runs(0).are_one_range(
            max_gap_bytes=limits.max_gap_bytes,
            max_over_read=limits.max_over_read,
            free_gap_bytes=limits.free_gap_bytes,
        )

    def _parts(self, max_request_bytes: int, *, single_rows: bool) -> Iterator[StridedCopy]:
        """Cut along the outermost dimension: into single rows, or into groups of rows that fit one request."""
        row_bytes = max(self.source_strides[0] * self.itemsize, 1)
        rows = 1 if single_rows else max(1, min(self.sizes[0] // 2, max_request_bytes // row_bytes))
        for start in range(0, self.sizes[0], rows):
            sizes = (min(rows, self.sizes[0] - start), *self.sizes[1:])
            yield StridedCopy(
                self.byte_offset + start * self.source_strides[0] * self.itemsize,
                self.arena_offset + start * self.strides[0] * self.itemsize,
                sizes,
                self.source_strides,
                self.strides,
                self.itemsize,
            ).normalized()

    def _gather(self) -> Gather:
        last = sum((n - 1) * s for n, s in zip(self.sizes, self.source_strides, strict=True))
        stop = self.byte_offset + (last + 1) * self.itemsize
        return Gather(
            self.byte_offset, stop, self.sizes, self.source_strides, self.arena_offset, self.strides, self.itemsize
        )


def requests_for(
    item: ItemLayout,
    *,
    source_offsets: tuple[int, ...],
    sizes: tuple[int, ...],
    arena_offset: int,
    strides: tuple[int, ...],
    limits: JoinLimits,
) -> list[Request]:
    """Requests that copy one box of a saved chunk to the arena; each is one request of the storage.

    Args:
        item: how the saved chunk lies in its item.
        source_offsets, sizes: the box in the chunk, elements.
        arena_offset: bytes, where the box's first element goes.
        strides: elements, of the box in the arena.
        limits: of the gaps that are read over, and of one request.
    """
    start = item.byte_position(source_offsets)
    copy = StridedCopy(start, arena_offset, sizes, item.strides, strides, item.dtype.itemsize)
    return list(copy.normalized().requests(limits))
