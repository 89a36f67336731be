"""Cut a saved chunk into slabs, each contiguous in its file, by which ranks want something of it.

A chunk is cut along its outermost dimension wherever the set of ranks that want something changes::

    chunk (4, 4), saved by rows; two ranks want a column half each, and a third one row 3
    row 0  |A A B B|
    row 1  |A A B B|      slab [0:3, 0:4] for ranks A and B: one of them reads all of it
    row 2  |A A B B|
    row 3  |A C B C|      slab [3:4, 0:4] for A, B and C

Where a request takes long (an object store), rows that belong to other ranks are no reason to cut: neighbouring rows that ranks of
one island want are one slab, as long as they fit a window. See `shardferry.plan.cooperative` for islands, and for who reads a slab.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from typing import Self

from shardferry.layout.tensor_layout import TensorLayout
from shardferry.plan.rank_layouts import Want
from shardferry.read.coalesce import JoinLimits
from shardferry.region import Region
from shardferry.storage.base import StorageTraits

_LOCAL_SLAB_BYTES = 1 << 20  # fits a core's cache, so that what is read for others is copied out of the cache
_LEAST_PART = 1 << 20  # bytes; a slab is divided among its ranks down to this
_LONG_RUN = 1 << 20  # bytes; boxes that share nothing and have runs as long are read by their own ranks


@dataclass(frozen=True, slots=True)
class SlabLimits:
    """How large slabs are, and which of them are read in one request."""

    max_bytes: int  # that one rank reads in one go for others; a single row may be longer
    window_bytes: int = 0  # of a file, in which slabs of the same ranks have one reader; 0: each chunk has its own

    @classmethod
    def of(cls, traits: StorageTraits, limits: JoinLimits) -> Self:
        """Of a kind of storage, and of its requests."""
        if traits.is_local:
            return cls(_LOCAL_SLAB_BYTES)
        # What begins in a window ends within two.
        return cls(limits.max_request_bytes, limits.max_request_bytes // 2)


@dataclass(frozen=True, slots=True)
class Delivery:
    """A box of a chunk on its way to one rank's local tensor."""

    world_rank: int
    source: Region  # in the chunk, elements
    offset: int  # elements, from the start of the rank's local tensor
    strides: tuple[int, ...]  # elements of the local tensor, a step in each dimension of `source`

    def within(self, dim: int, start: int, stop: int) -> Delivery | None:
        """The part of it between two positions of one dimension of the chunk."""
        first = self.source.offsets[dim]
        begin, end = max(start, first), min(stop, first + self.source.sizes[dim])
        if begin >= end:
            return None
        offsets = (*self.source.offsets[:dim], begin, *self.source.offsets[dim + 1 :])
        sizes = (*self.source.sizes[:dim], end - begin, *self.source.sizes[dim + 1 :])
        offset = self.offset + (begin - first) * self.strides[dim]
        return Delivery(self.world_rank, Region(offsets, sizes), offset, self.strides)


def deliveries_of(wants: Sequence[Want], chunk: Region) -> list[Delivery]:
    """What the ranks want of a chunk. Thousands may want the same: that is worked out once."""
    known: dict[int, list[Delivery]] = {}  # by the layout's id: whoever gives the wants keeps them
    found: list[Delivery] = []
    for world_rank, layout in wants:
        alike = known.get(id(layout))
        if alike is None:
            alike = known[id(layout)] = list(_delivery_of(world_rank, layout, chunk))
        found += [Delivery(world_rank, d.source, d.offset, d.strides) for d in alike]
    return found


def _delivery_of(world_rank: int, layout: TensorLayout, chunk: Region) -> Iterator[Delivery]:
    for box in layout.boxes:
        common = chunk.intersect(box.region)
        if common is not None:
            start, strides = layout.destination(box)
            inside = common.relative_to(box.region.offsets)
            offset = start + sum(o * s for o, s in zip(inside.offsets, strides, strict=True))
            yield Delivery(world_rank, common.relative_to(chunk.offsets), offset, strides)


def ranks_of(deliveries: Sequence[Delivery]) -> tuple[int, ...]:
    """World ranks, ascending, each once."""
    return tuple(sorted({delivery.world_rank for delivery in deliveries}))


@dataclass(frozen=True, slots=True)
class Cut:
    """A contiguous part of a chunk that one rank is to read, and where its boxes go."""

    region: Region  # in the chunk, elements
    deliveries: tuple[Delivery, ...]
    part: int = 0  # of the rows that are divided among the same ranks
    fits_window: bool = False  # it is read along with what lies beside it


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Rows of a chunk between two places where the ranks that want something change."""

    start: int
    stop: int
    deliveries: list[Delivery]  # of which something lies in them


@dataclass(frozen=True, slots=True)
class Cutter:
    """Cuts one chunk into slabs."""

    chunk_shape: tuple[int, ...]
    itemsize: int  # bytes
    limits: SlabLimits
    island: Callable[[int], str]  # of a world rank
    dim: int  # the outermost one along which a row-major chunk can be cut
    row_bytes: int

    @classmethod
    def of(cls, chunk_shape: tuple[int, ...], itemsize: int, limits: SlabLimits, island: Callable[[int], str]) -> Self:
        dim = next((dim for dim, size in enumerate(chunk_shape) if size > 1), 0)
        return cls(chunk_shape, itemsize, limits, island, dim, math.prod(chunk_shape[dim + 1 :]) * itemsize)

    def whole(self, deliveries: Sequence[Delivery]) -> Cut:
        """The chunk as one slab."""
        fits = math.prod(self.chunk_shape) * self.itemsize <= self.limits.window_bytes
        return Cut(Region.whole(self.chunk_shape), tuple(deliveries), fits_window=fits)

    def cuts(self, deliveries: Sequence[Delivery]) -> Iterator[Cut]:
        """In the order of the chunk's rows."""
        if not self.chunk_shape:
            yield self.whole(deliveries)
            return
        stretches = self._stretches(deliveries)
        for stretch in self._joined(stretches) if self.limits.window_bytes else stretches:
            yield from self._divided(stretch)

    def _stretches(self, deliveries: Sequence[Delivery]) -> Iterator[_Stretch]:
        """In order."""
        dim = self.dim
        bounds = sorted({bound for d in deliveries for bound in (d.source.offsets[dim], d.source.ends[dim])})
        waiting = sorted(enumerate(deliveries), key=lambda entry: entry[1].source.offsets[dim], reverse=True)
        here: list[tuple[int, Delivery]] = []
        for start, stop in pairwise(bounds):
            while waiting and waiting[-1][1].source.offsets[dim] <= start:
                here.append(waiting.pop())
            here = sorted((entry for entry in here if entry[1].source.ends[dim] > start), key=itemgetter(0))
            if here:
                yield _Stretch(start, stop, [delivery for _, delivery in here])

    def _joined(self, stretches: Iterable[_Stretch]) -> Iterator[_Stretch]:
        """Neighbours that one island wants whole are one, up to a window's size."""
        group: list[_Stretch] = []
        island: str | None = None  # of the group; None: nothing may be joined to it
        for stretch in stretches:
            its = self._joinable(stretch)
            fits = bool(group) and (stretch.stop - group[0].start) * self.row_bytes <= self.limits.window_bytes
            if group and not (fits and its is not None and its == island and group[-1].stop == stretch.start):
                yield self._one(group)
                group = []
            group.append(stretch)
            island = its
        if group:
            yield self._one(group)

    def _joinable(self, stretch: _Stretch) -> str | None:
        """The one island that wants a stretch; None where it is left by itself.

        That is also where rows are not wanted whole, and where a rank has a long run to itself: it reads that in place.
        """
        islands = {self.island(delivery.world_rank) for delivery in stretch.deliveries}
        whole_rows = self.chunk_shape[self.dim + 1 :]
        if len(islands) > 1 or all(d.source.sizes[self.dim + 1 :] != whole_rows for d in stretch.deliveries):
            return None
        is_long = (stretch.stop - stretch.start) * self.row_bytes >= _LONG_RUN
        return None if is_long and len(ranks_of(stretch.deliveries)) == 1 else islands.pop()

    def _one(self, group: Sequence[_Stretch]) -> _Stretch:
        first = group[0]
        new = [d for one in group[1:] for d in one.deliveries if d.source.offsets[self.dim] == one.start]
        return _Stretch(first.start, group[-1].stop, first.deliveries + new)

    def _divided(self, stretch: _Stretch) -> Iterator[Cut]:
        """The rows of a stretch, divided among the ranks that want something of them."""
        start, stop = stretch.start, stretch.stop
        deliveries = self._within(stretch.deliveries, start, stop)
        ranks = ranks_of(deliveries)
        if len(ranks) == 1 or self._better_alone(deliveries):
            for rank in ranks:
                yield Cut(self._rows(start, stop), tuple(d for d in deliveries if d.world_rank == rank))
            return
        num_rows = stop - start
        nbytes, window_bytes = num_rows * self.row_bytes, self.limits.window_bytes
        parts = min(len(ranks), max(1, nbytes // max(_LEAST_PART, window_bytes)), num_rows)
        step = max(1, self.limits.max_bytes // max(self.row_bytes, 1))
        for part in range(parts):
            begin, end = start + num_rows * part // parts, start + num_rows * (part + 1) // parts
            for first in range(begin, end, step):
                last = min(first + step, end)
                here = tuple(self._within(deliveries, first, last))
                yield Cut(self._rows(first, last), here, part, fits_window=nbytes <= window_bytes)

    def _within(self, deliveries: Sequence[Delivery], start: int, stop: int) -> list[Delivery]:
        return [part for d in deliveries if (part := d.within(self.dim, start, stop)) is not None]

    def _rows(self, start: int, stop: int) -> Region:
        before, behind = (0,) * self.dim, len(self.chunk_shape) - self.dim - 1
        sizes = (*self.chunk_shape[: self.dim], stop - start, *self.chunk_shape[self.dim + 1 :])
        return Region((*before, start, *(0,) * behind), sizes)

    def _better_alone(self, deliveries: Sequence[Delivery]) -> bool:
        """Whether no element is wanted twice and every run is long: then nothing is gained by reading for others."""
        if any(self._run_bytes(d.source) < _LONG_RUN for d in deliveries):
            return False
        return all(a.source.intersect(b.source) is None for i, a in enumerate(deliveries) for b in deliveries[i + 1 :])

    def _run_bytes(self, box: Region) -> int:
        """Bytes of the box that lie together in a row-major chunk."""
        run = self.itemsize
        for size, whole in zip(reversed(box.sizes), reversed(self.chunk_shape), strict=True):
            run *= size
            if size < whole:
                break
        return run
