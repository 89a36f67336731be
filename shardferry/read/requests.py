"""Turn a box copy and its item's layout into requests: contiguous ones, or strided ones through a window.

::

    chunk (4, 6) row-major, wanted [0:4, 0:6]   one run of 24 elements            -> ContiguousRead
    chunk (4, 6) row-major, wanted [0:4, 0:3]   4 runs of 3 elements, short       -> StridedRead of one window
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from shardferry.arena import Destination, strided_view
from shardferry.config import ReadLimits
from shardferry.read.coalesce import strided_is_one_request
from shardferry.read.zip_header import HEADER_BYTES, ItemLayout
from shardferry.region import BoxCopy


@dataclass(frozen=True, slots=True)
class ContiguousRead:
    """Bytes that are contiguous in the item and in the destination."""

    start: int  # bytes, in the item
    stop: int  # bytes, in the item, exclusive
    offset: int  # bytes, from the destination of the copy's first element

    @property
    def wanted_bytes(self) -> int:
        return self.stop - self.start

    def copy_from(self, window: memoryview, destination: Destination, byte_offset: int) -> None:
        """Copy the request's bytes to their destination.

        Args:
            window: bytes `start` to `stop` of the item.
            byte_offset: of the copy's first element in the destination.
        """
        destination.write(byte_offset + self.offset, window)


@dataclass(frozen=True, kw_only=True)
class StridedRead:
    """A strided copy out of a window of the item."""

    start: int  # bytes, in the item: where the window starts
    offset: int  # bytes, from the destination of the copy's first element to that of this read's
    sizes: tuple[int, ...]
    source_strides: tuple[int, ...]  # elements
    strides: tuple[int, ...]  # elements
    itemsize: int

    @cached_property
    def stop(self) -> int:
        """Bytes, in the item, exclusive: where the window ends."""
        last = sum((n - 1) * s for n, s in zip(self.sizes, self.source_strides, strict=True))
        return self.start + (last + 1) * self.itemsize

    @cached_property
    def wanted_bytes(self) -> int:
        """Bytes that are copied; the window may be wider."""
        return math.prod(self.sizes) * self.itemsize

    def copy_from(self, window: memoryview, destination: Destination, byte_offset: int) -> None:
        """As `ContiguousRead.copy_from`."""
        elements: np.ndarray = strided_view(
            window, byte_offset=0, sizes=self.sizes, strides=self.source_strides, itemsize=self.itemsize
        )
        byte_strides = tuple(stride * self.itemsize for stride in self.strides)
        destination.scatter(byte_offset + self.offset, elements, byte_strides)

    def normalized(self) -> StridedRead:
        """The same copy with dimensions of size 1 dropped, the rest in the source's order, and contiguous ones merged."""
        dims = [d for d in zip(self.sizes, self.source_strides, self.strides, strict=True) if d[0] != 1]
        dims.sort(key=lambda d: -d[1])
        merged: list[tuple[int, int, int]] = []
        for size, source, target in dims:
            if merged and merged[-1][1:] == (source * size, target * size):
                merged[-1] = (merged[-1][0] * size, source, target)
            else:
                merged.append((size, source, target))
        sizes, sources, targets = zip(*merged, strict=True) if merged else ((), (), ())
        return replace(self, sizes=sizes, source_strides=sources, strides=targets)

    def split(self, limits: ReadLimits) -> Iterator[Request]:
        """The requests of a normalized copy, in ascending order."""
        # So that the item's header fits into the same request.
        max_bytes = limits.max_request_bytes - HEADER_BYTES * (limits.max_request_bytes > 2 * HEADER_BYTES)
        is_contiguous = not self.sizes or (self.source_strides[-1], self.strides[-1]) == (1, 1)
        if 0 in self.sizes:
            return
        if is_contiguous and len(self.sizes) <= 1:
            for first in range(0, self.wanted_bytes, max_bytes):
                last = min(first + max_bytes, self.wanted_bytes)
                yield ContiguousRead(self.start + first, self.start + last, self.offset + first)
            return
        if limits.maps_files:  # the gaps are not fetched
            by_runs = is_contiguous and self.sizes[-1] * self.itemsize >= limits.long_run_bytes
        else:
            by_runs = not self._is_one_request(limits)
        if not by_runs and self.stop - self.start <= max_bytes:
            yield self
            return
        row_bytes = max(self.source_strides[0] * self.itemsize, 1)
        for part in self._rows(1 if by_runs else max(1, min(self.sizes[0] // 2, max_bytes // row_bytes))):
            yield from part.split(limits)

    def _is_one_request(self, limits: ReadLimits) -> bool:
        """Whether the window is better fetched whole than run by run; its length is not checked."""
        has_runs = self.source_strides[-1] == 1
        dims = len(self.sizes) - has_runs
        return strided_is_one_request(
            run_bytes=(self.sizes[-1] if has_runs else 1) * self.itemsize,
            counts=self.sizes[:dims],
            byte_strides=[stride * self.itemsize for stride in self.source_strides[:dims]],
            limits=limits,
        )

    def _rows(self, num_rows: int) -> Iterator[StridedRead]:
        """Split along the outermost dimension, into so many rows each."""
        for first in range(0, self.sizes[0], num_rows):
            yield replace(
                self,
                start=self.start + first * self.source_strides[0] * self.itemsize,
                offset=self.offset + first * self.strides[0] * self.itemsize,
                sizes=(min(num_rows, self.sizes[0] - first), *self.sizes[1:]),
            ).normalized()


Request = ContiguousRead | StridedRead


def requests_for(layout: ItemLayout, copy: BoxCopy, limits: ReadLimits) -> list[Request]:
    """The requests that carry out one copy, in ascending order of their start.

    Args:
        layout: of the saved chunk in its item.
        copy: offsets in the destination are counted from its first element.
        limits: of the gaps that are read over, and of one request.
    """
    strided = StridedRead(
        start=layout.byte_position(copy.source.offsets),
        offset=0,
        sizes=copy.source.sizes,
        source_strides=layout.strides,
        strides=copy.strides,
        itemsize=layout.dtype.itemsize,
    )
    return list(strided.normalized().split(limits))
