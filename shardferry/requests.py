"""Turn a read item and the layout of its saved item into byte ranges: in-place reads, or a strided gather.

::

    chunk (4, 6) row-major, wanted [0:4, 0:6]   one run of 24 elements            -> InPlaceRead
    chunk (4, 6) row-major, wanted [0:4, 0:3]   4 runs of 3 elements, short       -> Gather through a window
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from shardferry.decode import ItemLayout
from shardferry.storage.runs import Runs

LONG_RUN = 64 * 1024  # bytes; runs from this length on are read one by one, shorter ones through a window
MAX_REQUEST = 8 * 1024 * 1024  # bytes that one request asks for


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

    def runs(self, item_offset: int) -> Runs:
        """Where the bytes that are looked at lie in a file whose item starts at ``item_offset``."""
        packed = bool(self.sizes) and self.source_strides[-1] == 1
        dims = len(self.sizes) - packed
        return Runs(
            start=item_offset + self.window_start,
            run_bytes=(self.sizes[-1] if packed else 1) * self.itemsize,
            counts=self.sizes[:dims],
            byte_strides=tuple(stride * self.itemsize for stride in self.source_strides[:dims]),
        )


Request = InPlaceRead | Gather


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

    def requests(self) -> Iterator[Request]:
        """Cut into requests, in ascending order of byte offset."""
        if 0 in self.sizes:
            return
        contiguous = not self.sizes or (self.source_strides[-1], self.strides[-1]) == (1, 1)
        run = (self.sizes[-1] if self.sizes else 1) * self.itemsize
        if contiguous and len(self.sizes) <= 1:
            for start in range(0, run, MAX_REQUEST):
                yield InPlaceRead(self.byte_offset + start, self.arena_offset + start, min(MAX_REQUEST, run - start))
        elif (contiguous and run >= LONG_RUN) or (self.sizes[0] > 1 and self._window_bytes() > MAX_REQUEST):
            for part in self._parts(whole_rows=contiguous and run >= LONG_RUN):
                yield from part.requests()
        else:
            yield self._gather()

    def _window_bytes(self) -> int:
        last = sum((n - 1) * s for n, s in zip(self.sizes, self.source_strides, strict=True))
        return (last + 1) * self.itemsize

    def _parts(self, *, whole_rows: bool) -> Iterator[StridedCopy]:
        """Cut along the outermost dimension: into single rows, or into groups of rows that fit one request."""
        row_bytes = max(self.source_strides[0] * self.itemsize, 1)
        rows = 1 if whole_rows else max(1, min(self.sizes[0] // 2, MAX_REQUEST // row_bytes))
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
        stop = self.byte_offset + self._window_bytes()
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
) -> list[Request]:
    """Requests that copy one box of a saved chunk to the arena.

    Args:
        item: how the saved chunk lies in its item.
        source_offsets, sizes: the box in the chunk, elements.
        arena_offset: bytes, where the box's first element goes.
        strides: elements, of the box in the arena.
    """
    start = item.byte_position(source_offsets)
    copy = StridedCopy(start, arena_offset, sizes, item.strides, strides, item.dtype.itemsize)
    return list(copy.normalized().requests())
