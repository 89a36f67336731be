"""Decide who reads what for whom: parts of saved chunks that several ranks want are read once, by one of them.

A chunk is cut along its outermost dimension wherever the set of ranks that want something changes. Such a slab is contiguous
in its file. One rank alone: it reads for itself. Several: one of them reads the slab and gives each its boxes::

    chunk (4, 4), saved by rows; two ranks want a column half each, and a third one row 3
    row 0  |A A B B|
    row 1  |A A B B|      slab [0:3, 0:4] for ranks A and B: one of them reads all of it
    row 2  |A A B B|
    row 3  |A C B C|      slab [3:4, 0:4] for A, B and C

Where a request takes long (an object store), rows that belong to other ranks are no reason to cut: what ranks of one island want
of a chunk is one slab, and slabs that lie side by side in a file have one reader, so that they are one request::

    file      |A A A B|A A A B|A A A B|A A A B| ...   chunks, each wanted by two ranks
    windows   |- read by A ---|- read by B ---| ...   as often by each as it wants something

Ranks that can write into each other's arenas are an island (the ranks of a node; a rank whose arena is on a GPU is one by
itself). To another island a slab goes once, as the smallest box that holds what is wanted there, to one of its ranks,
the relay, which gives the others theirs.

Everything here is a pure function of catalog, layouts and islands, so that all ranks decide alike without a word.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from operator import itemgetter
from typing import Self

from shardferry.catalog import Catalog
from shardferry.collector import paused_gc
from shardferry.item_format import TransformedItem
from shardferry.layout import TensorLayout
from shardferry.plan import LoadPlan, PlannedTensor, ReadItem
from shardferry.region import Region
from shardferry.storage.traits import StorageTraits
from shardferry.wants import Want, Wants

_LOCAL_SLAB_BYTES = 1 << 20  # fits a core's cache, so that what is read for others is copied out of the cache
_LEAST_PART = 1 << 20  # bytes; a slab is divided among its ranks down to this
_LONG_RUN = 1 << 20  # bytes; boxes that share nothing and have runs as long are read by their own ranks
_GOLDEN = 0x9E3779B97F4A7C15  # the golden ratio's fraction, in 2**-64: its multiples lie evenly spread over a circle


@dataclass(frozen=True, slots=True)
class SlabLimits:
    """How large slabs are, and which of them have one reader."""

    max_bytes: int  # that one rank reads in one go for others; a single row may be longer
    window_bytes: int = 0  # of a file, in which slabs have one reader; 0: each chunk has its own

    @classmethod
    def of(cls, traits: StorageTraits) -> Self:
        """Of a kind of storage."""
        if traits.is_local:
            return cls(_LOCAL_SLAB_BYTES)
        # A window, with the end of its last slab, is one request.
        return cls(traits.max_request_bytes, traits.max_request_bytes // 2)


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


@dataclass(frozen=True, slots=True)
class Forward:
    """A box of a slab on its way to another island."""

    relay: int  # world rank that gets it
    box: Region  # in the chunk, elements; it travels packed, row-major
    index: int  # its place among all that goes from this reader to this relay


@dataclass(frozen=True, slots=True)
class SharedRead:
    """A slab of one chunk that this rank reads for several ranks."""

    tensor: int  # row of LoadPlan.tensors
    chunk: int  # row of the catalog
    chunk_shape: tuple[int, ...]
    region: Region  # in the chunk, elements
    deliveries: tuple[Delivery, ...]  # to ranks of its island
    forwards: tuple[Forward, ...]
    numel_wanted: int  # elements, by all ranks together

    @property
    def numel(self) -> int:
        return self.region.numel


@dataclass(frozen=True, slots=True)
class Relayed:
    """A box of a slab that comes from another island's reader, for ranks of this one."""

    tensor: int  # row of LoadPlan.tensors
    chunk: int  # row of the catalog
    box: Region  # in the chunk, elements
    itemsize: int  # bytes
    deliveries: tuple[Delivery, ...]

    @property
    def nbytes(self) -> int:
        return self.box.numel * self.itemsize


@dataclass(frozen=True, slots=True)
class SharedPlan:
    """One rank's part of the reads of all ranks that read for each other."""

    own: tuple[ReadItem, ...]  # that it reads for itself
    shared: tuple[SharedRead, ...]  # that it reads for others, or for others and itself
    bytes_sent: int  # that it reads, wanted by other ranks
    bytes_received: int  # that it wants, read by other ranks
    bytes_forwarded: int = 0  # through the process group, to other islands
    relayed: Mapping[int, tuple[Relayed, ...]] = field(default_factory=dict)  # by the reader's world rank, in order

    @property
    def relays(self) -> frozenset[int]:
        """World ranks of other islands that this rank sends to."""
        return frozenset(forward.relay for read in self.shared for forward in read.forwards)


Islands = Mapping[int, str]  # by world rank: a name, the same for ranks that write into each other's arenas


@paused_gc()
def share_reads(
    plan: LoadPlan, catalog: Catalog, wants: Wants, *, slabs: SlabLimits, islands: Islands | None = None
) -> SharedPlan:
    """Divide the reads of some ranks among them; gives the part of the plan's own rank.

    Args:
        wants: of the ranks that read for each other.
        slabs: how large they are, and which of them have one reader.
        islands: None where all of them are on one.
    """
    return _Sharer(plan, catalog, wants, slabs, islands).result()


class _Sharer:
    def __init__(
        self, plan: LoadPlan, catalog: Catalog, wants: Wants, limits: SlabLimits, islands: Islands | None
    ) -> None:
        self._plan = plan
        self._catalog = catalog
        self._wants = wants
        self._limits = limits
        self._islands = islands
        self._known: dict[tuple[object, ...], list[_Slab]] = {}  # most chunks look like some other
        self._own: list[ReadItem] = []
        self._shared: list[SharedRead] = []
        self._num_forwarded: dict[int, int] = defaultdict(int)  # by relay
        self._relayed: dict[int, list[Relayed]] = defaultdict(list)  # by reader
        self._sent = self._received = self._forwarded = 0  # bytes

    def result(self) -> SharedPlan:
        # By chunk: a reader and its relay count alike only where they go through their common chunks in the same order.
        for (row, chunk), items in sorted(_by_chunk(self._plan.reads).items(), key=lambda entry: entry[0][1]):
            wants, slabs = self._slabs(self._plan.tensors[row], chunk, items[0].chunk_shape)
            if not slabs:
                self._own += items
            for slab in slabs:
                turn = self._turn(chunk, len(wants))
                self._add(_Place(row, chunk, items[0].chunk_shape, chunk + slab.index), slab, slab.reader(turn))
        return SharedPlan(
            tuple(self._own),
            tuple(self._shared),
            self._sent,
            self._received,
            self._forwarded,
            {reader: tuple(boxes) for reader, boxes in self._relayed.items()},
        )

    def _add(self, place: _Place, slab: _Slab, reader: int) -> None:
        me, itemsize = self._plan.world_rank, self._plan.tensors[place.tensor].dtype.itemsize
        if reader != me:
            self._received += itemsize * slab.num_mine
            self._relay(place, slab, reader, itemsize)
            return
        if len(slab.mine) == slab.num_deliveries:
            self._own += [
                ReadItem(place.tensor, place.chunk, d.source, place.chunk_shape, d.offset, d.strides) for d in slab.mine
            ]
            return
        self._sent += itemsize * (slab.num_wanted - slab.num_mine)
        here = slab.groups[self._island(me)].deliveries
        others = [group for island, group in slab.groups.items() if island != self._island(me)]
        forwards = tuple(self._forward(place, group, itemsize) for group in others)
        self._shared.append(
            SharedRead(place.tensor, place.chunk, place.chunk_shape, slab.region, here, forwards, slab.num_wanted)
        )

    def _turn(self, chunk: int, num_wanting: int) -> int:
        """Which of its ranks begins to read a chunk: another one for each, or for each window of a file."""
        if not self._limits.window_bytes:
            return chunk % max(num_wanting, 1)
        file, start = self._catalog.chunk_file[chunk], self._catalog.chunk_byte_offset[chunk]
        return int(file) + int(start) // self._limits.window_bytes

    def _island(self, world_rank: int) -> str:
        return "" if self._islands is None else self._islands[world_rank]

    def _forward(self, place: _Place, group: _Group, itemsize: int) -> Forward:
        relay = place.relay(group)
        index = self._num_forwarded[relay]
        self._num_forwarded[relay] += 1
        self._forwarded += group.box.numel * itemsize
        return Forward(relay, group.box, index)

    def _relay(self, place: _Place, slab: _Slab, reader: int, itemsize: int) -> None:
        """What another island's reader sends to this rank."""
        if len(slab.groups) == 1:  # then none does
            return
        me = self._plan.world_rank
        here = slab.groups[self._island(me)]
        if self._island(reader) != self._island(me) and place.relay(here) == me:
            self._relayed[reader].append(Relayed(place.tensor, place.chunk, here.box, itemsize, here.deliveries))

    def _slabs(
        self, tensor: PlannedTensor, chunk: int, chunk_shape: tuple[int, ...]
    ) -> tuple[tuple[Want, ...], list[_Slab]]:
        """Who wants something of a chunk, and its slabs that concern this rank; none where each rank reads for itself."""
        region = self._catalog.region(self._catalog.tensors[tensor.key], chunk)
        wants = self._wants.of(tensor, region)
        ranged = not isinstance(self._catalog.formats[self._catalog.chunk_format[chunk]], TransformedItem)
        alike = (id(wants), region, tensor.dtype.itemsize, ranged)  # whoever gives the wants keeps them
        slabs = self._known.get(alike)
        if slabs is None:
            deliveries = _deliveries(wants, region)
            cutter = _Cutter.of(chunk_shape, tensor.dtype.itemsize, self._limits, self._island)
            # What can't be read in ranges is decoded by one rank for all.
            cuts = list(cutter.cuts(deliveries)) if ranged else [cutter.whole(deliveries)]
            slabs = self._known[alike] = self._of_this_rank(cuts)
        return wants, slabs

    def _of_this_rank(self, cuts: Sequence[_Cut]) -> list[_Slab]:
        if all(len(cut.deliveries) == 1 for cut in cuts):
            return []
        me = self._plan.world_rank
        mine = [(index, cut) for index, cut in enumerate(cuts) if any(d.world_rank == me for d in cut.deliveries)]
        return [_Slab.of(cut, index, me, self._island) for index, cut in mine]


@dataclass(frozen=True)
class _Group:
    """What an island wants of a slab."""

    ranks: list[int]  # ascending
    deliveries: tuple[Delivery, ...]

    @classmethod
    def of(cls, deliveries: Sequence[Delivery]) -> _Group:
        return cls(_ranks_of(deliveries), tuple(deliveries))

    @cached_property
    def box(self) -> Region:
        """The smallest with everything of it; in the chunk. Only what goes to another island has it worked out."""
        return _around(self.deliveries)


@dataclass(frozen=True, slots=True)
class _Slab:
    """A slab as one of its ranks sees it: the same for all chunks that are saved and wanted alike."""

    index: int  # in its chunk
    region: Region  # in the chunk, elements
    part: int
    ranks: list[int]  # that want something of it
    mine: tuple[Delivery, ...]
    num_mine: int  # elements
    num_wanted: int  # elements, by all ranks together
    num_deliveries: int
    groups: dict[str, _Group]  # by island
    shares: Sequence[int]  # elements up to which it is read by each of its ranks; empty: all read alike much

    @classmethod
    def of(cls, cut: _Cut, index: int, world_rank: int, island: Callable[[int], str]) -> _Slab:
        groups: dict[str, list[Delivery]] = defaultdict(list)
        for delivery in cut.deliveries:
            groups[island(delivery.world_rank)].append(delivery)
        mine = tuple(d for d in cut.deliveries if d.world_rank == world_rank)
        ranks = _ranks_of(cut.deliveries)
        return cls(
            index,
            cut.region,
            cut.part,
            ranks,
            mine,
            sum(d.source.numel for d in mine),
            sum(d.source.numel for d in cut.deliveries),
            len(cut.deliveries),
            {name: _Group.of(deliveries) for name, deliveries in groups.items()},
            _shares(cut.deliveries, ranks) if cut.is_joined else (),
        )

    def reader(self, turn: int) -> int:
        """The world rank that reads it.

        Args:
            turn: see `_Sharer._turn`.
        """
        if self.shares:  # each reads about as much as it wants
            place = (turn * _GOLDEN % 2**64) * self.shares[-1] >> 64
            return self.ranks[bisect_right(self.shares, place)]
        return self.ranks[(self.part + turn) % len(self.ranks)]


@dataclass(frozen=True, slots=True)
class _Place:
    """Which slab of which chunk."""

    tensor: int  # row of LoadPlan.tensors
    chunk: int  # row of the catalog
    chunk_shape: tuple[int, ...]
    turn: int

    def relay(self, group: _Group) -> int:
        """Which of an island's ranks takes what comes for it: another one for each slab, so that all take alike much."""
        return group.ranks[self.turn % len(group.ranks)]


def _around(deliveries: Sequence[Delivery]) -> Region:
    """The smallest box with everything of some deliveries."""
    offsets = tuple(map(min, zip(*(d.source.offsets for d in deliveries), strict=True)))
    ends = tuple(map(max, zip(*(d.source.ends for d in deliveries), strict=True)))
    return Region(offsets, tuple(end - offset for end, offset in zip(ends, offsets, strict=True)))


def _by_chunk(reads: Sequence[ReadItem]) -> dict[tuple[int, int], list[ReadItem]]:
    chunks: dict[tuple[int, int], list[ReadItem]] = {}
    for item in reads:
        chunks.setdefault((item.tensor, item.chunk), []).append(item)
    return chunks


def _deliveries(wants: Sequence[Want], chunk: Region) -> list[Delivery]:
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


@dataclass(frozen=True, slots=True)
class _Cut:
    """A contiguous part of a chunk that one rank is to read, and where its boxes go."""

    region: Region  # in the chunk, elements
    deliveries: tuple[Delivery, ...]
    part: int = 0  # of the rows that are divided among the same ranks
    is_joined: bool = False  # some of its rows are wanted by some of its ranks alone


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Rows of a chunk that are looked at together."""

    start: int
    stop: int
    deliveries: list[Delivery]  # of which something lies in them
    is_joined: bool = False


@dataclass(frozen=True, slots=True)
class _Cutter:
    """Cuts one chunk into slabs."""

    chunk_shape: tuple[int, ...]
    itemsize: int  # bytes
    limits: SlabLimits
    island: Callable[[int], str]  # of a world rank
    dim: int  # the outermost one along which a row-major chunk can be cut
    row_bytes: int

    @classmethod
    def of(
        cls, chunk_shape: tuple[int, ...], itemsize: int, limits: SlabLimits, island: Callable[[int], str]
    ) -> _Cutter:
        dim = next((dim for dim, size in enumerate(chunk_shape) if size > 1), 0)
        return cls(chunk_shape, itemsize, limits, island, dim, math.prod(chunk_shape[dim + 1 :]) * itemsize)

    def whole(self, deliveries: Sequence[Delivery]) -> _Cut:
        """The chunk as one slab."""
        return _Cut(Region.whole(self.chunk_shape), tuple(deliveries))

    def cuts(self, deliveries: Sequence[Delivery]) -> Iterator[_Cut]:
        """In the order of the chunk's rows."""
        if not self.chunk_shape:
            yield self.whole(deliveries)
            return
        stretches = self._stretches(deliveries)
        for stretch in self._joined(stretches) if self.limits.window_bytes else stretches:
            yield from self._divided(stretch)

    def _stretches(self, deliveries: Sequence[Delivery]) -> Iterator[_Stretch]:
        """The rows between two places where the ranks that want something change, in order."""
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
        """Neighbours of which all is wanted on one and the same island are one, up to a window's size."""
        before: _Stretch | None = None
        for stretch in stretches:
            if before is not None and self._are_one(before, stretch):
                new = [
                    delivery for delivery in stretch.deliveries if delivery.source.offsets[self.dim] == stretch.start
                ]
                before = _Stretch(before.start, stretch.stop, before.deliveries + new, is_joined=True)
                continue
            if before is not None:
                yield before
            before = stretch
        if before is not None:
            yield before

    def _are_one(self, before: _Stretch, behind: _Stretch) -> bool:
        fits = (behind.stop - before.start) * self.row_bytes <= self.limits.window_bytes
        if before.stop != behind.start or not fits:
            return False
        return len({self.island(d.world_rank) for d in (*before.deliveries, *behind.deliveries)}) == 1

    def _divided(self, stretch: _Stretch) -> Iterator[_Cut]:
        """The rows of a stretch, divided among the ranks that want something of them."""
        start, stop = stretch.start, stretch.stop
        deliveries = self._within(stretch.deliveries, start, stop)
        ranks = _ranks_of(deliveries)
        if len(ranks) == 1 or self._better_alone(deliveries):
            for rank in ranks:
                yield _Cut(self._rows(start, stop), tuple(d for d in deliveries if d.world_rank == rank))
            return
        num_rows = stop - start
        least_bytes = max(_LEAST_PART, self.limits.window_bytes)
        parts = min(len(ranks), max(1, num_rows * self.row_bytes // least_bytes), num_rows)
        step = max(1, self.limits.max_bytes // max(self.row_bytes, 1))
        for part in range(parts):
            begin, end = start + num_rows * part // parts, start + num_rows * (part + 1) // parts
            for first in range(begin, end, step):
                last = min(first + step, end)
                here = tuple(self._within(deliveries, first, last))
                yield _Cut(self._rows(first, last), here, part, stretch.is_joined)

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


def _ranks_of(deliveries: Sequence[Delivery]) -> list[int]:
    return sorted({delivery.world_rank for delivery in deliveries})


def _shares(deliveries: Sequence[Delivery], ranks: Sequence[int]) -> list[int]:
    """What the ranks want of a slab, summed up rank by rank; elements."""
    wanted = dict.fromkeys(ranks, 0)
    for delivery in deliveries:
        wanted[delivery.world_rank] += delivery.source.numel
    return list(accumulate(wanted.values()))
