"""Turn a box copy and its item's layout into requests: contiguous ones, or strided ones through a window.

::

    chunk (4, 6) row-major, wanted [0:4, 0:6]   one run of 24 elements            -> ContiguousRead
    chunk (4, 6) row-major, wanted [0:4, 0:3]   4 runs of 3 elements, short       -> StridedRead of one window
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
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

    def copy_from(self, content: memoryview, destination: Destination, byte_offset: int) -> None:
        """Copy out of an item's bytes.

        Args:
            content: of the item, from its start to at least `stop`.
            byte_offset: of the copy's first element in the destination.
        """
        destination.write(byte_offset + self.offset, content[self.start : self.stop])


@dataclass(frozen=True)
class StridedRead:
    """A strided copy out of a window of the item; all strides in elements."""

    start: int  # bytes, in the item: where the window starts
    stop: int  # bytes, in the item, exclusive
    offset: int  # bytes, from the destination of the copy's first element to that of this read's
    sizes: tuple[int, ...]
    source_strides: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int

    @cached_property
    def wanted_bytes(self) -> int:
        """Bytes that are copied; the window may be wider."""
        return math.prod(self.sizes) * self.itemsize

    @property
    def run_bytes(self) -> int:
        """Bytes of one contiguous run."""
        return (self.sizes[-1] if self._has_runs else 1) * self.itemsize

    @property
    def _has_runs(self) -> bool:
        return bool(self.sizes) and self.source_strides[-1] == 1

    def is_one_request(self, limits: ReadLimits) -> bool:
        """Whether the window is better fetched whole than run by run; its length is not checked."""
        dims = len(self.sizes) - self._has_runs
        return strided_is_one_request(
            run_bytes=self.run_bytes,
            counts=self.sizes[:dims],
            byte_strides=[stride * self.itemsize for stride in self.source_strides[:dims]],
            limits=limits,
        )

    def copy_from(self, content: memoryview, destination: Destination, byte_offset: int) -> None:
        """As `ContiguousRead.copy_from`."""
        self.copy_from_window(content[self.start : self.stop], destination, byte_offset)

    def copy_from_window(self, window: memoryview, destination: Destination, byte_offset: int) -> None:
        """As `copy_from`, out of the window alone."""
        elements: np.ndarray = strided_view(
            window, byte_offset=0, sizes=self.sizes, strides=self.source_strides, itemsize=self.itemsize
        )
        byte_strides = tuple(stride * self.itemsize for stride in self.strides)
        destination.scatter(byte_offset + self.offset, elements, byte_strides)


Request = ContiguousRead | StridedRead


def requests_for(layout: ItemLayout, copy: BoxCopy, limits: ReadLimits) -> list[Request]:
    """The requests that carry out one copy, in ascending order of their start.

    Args:
        layout: of the saved chunk in its item.
        copy: offsets in the destination are counted from its first element.
        limits: of the gaps that are read over, and of one request.
    """
    strided = _StridedCopy(
        start=layout.byte_position(copy.source.offsets),
        offset=0,
        sizes=copy.source.sizes,
        source_strides=layout.strides,
        strides=copy.strides,
        itemsize=layout.dtype.itemsize,
    )
    return list(strided.normalized().requests(limits))


def max_data_bytes(limits: ReadLimits) -> int:
    """Of a request for an item's data: so that the item's header fits into the same request."""
    return limits.max_request_bytes - HEADER_BYTES * (limits.max_request_bytes > 2 * HEADER_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class _StridedCopy:
    """A box copy in bytes of the item, before it is split into requests."""

    start: int  # bytes, of the first element in the item
    offset: int  # bytes, from the destination of the copy's first element
    sizes: tuple[int, ...]
    source_strides: tuple[int, ...]  # elements
    strides: tuple[int, ...]  # elements
    itemsize: int

    def normalized(self) -> _StridedCopy:
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
        return _StridedCopy(
            start=self.start,
            offset=self.offset,
            sizes=sizes,
            source_strides=sources,
            strides=targets,
            itemsize=self.itemsize,
        )

    def requests(self, limits: ReadLimits) -> Iterator[Request]:
        """Split a normalized copy into requests, in ascending order."""
        if 0 in self.sizes:
            return
        if self._is_contiguous() and len(self.sizes) <= 1:
            yield from self._contiguous(max_data_bytes(limits))
            return
        whole = self._as_read()
        run_by_run = self._is_read_by_runs(whole, limits)
        if not run_by_run and whole.stop - whole.start <= max_data_bytes(limits):
            yield whole
            return
        for part in self._rows(max_data_bytes(limits), single=run_by_run):
            yield from part.requests(limits)

    def _is_contiguous(self) -> bool:
        """Whether the innermost dimension is contiguous, in the item and in the destination."""
        return not self.sizes or (self.source_strides[-1], self.strides[-1]) == (1, 1)

    def _contiguous(self, max_bytes: int) -> Iterator[ContiguousRead]:
        nbytes = (self.sizes[-1] if self.sizes else 1) * self.itemsize
        for first in range(0, nbytes, max_bytes):
            last = min(first + max_bytes, nbytes)
            yield ContiguousRead(self.start + first, self.start + last, self.offset + first)

    def _is_read_by_runs(self, whole: StridedRead, limits: ReadLimits) -> bool:
        if limits.maps_files:  # the gaps are not fetched
            return self._is_contiguous() and whole.run_bytes >= limits.long_run_bytes
        return not whole.is_one_request(limits)

    def _rows(self, max_bytes: int, *, single: bool) -> Iterator[_StridedCopy]:
        """Split along the outermost dimension: into single rows, or into groups of rows that fit one request."""
        row_bytes = max(self.source_strides[0] * self.itemsize, 1)
        rows = 1 if single else max(1, min(self.sizes[0] // 2, max_bytes // row_bytes))
        for first in range(0, self.sizes[0], rows):
            yield _StridedCopy(
                start=self.start + first * self.source_strides[0] * self.itemsize,
                offset=self.offset + first * self.strides[0] * self.itemsize,
                sizes=(min(rows, self.sizes[0] - first), *self.sizes[1:]),
                source_strides=self.source_strides,
                strides=self.strides,
                itemsize=self.itemsize,
            ).normalized()

    def _as_read(self) -> StridedRead:
        last = sum((n - 1) * s for n, s in zip(self.sizes, self.source_strides, strict=True))
        return StridedRead(
            start=self.start,
            stop=self.start + (last + 1) * self.itemsize,
            offset=self.offset,
            sizes=self.sizes,
            source_strides=self.source_strides,
            strides=self.strides,
            itemsize=self.itemsize,
        )
