"""Decide who reads what for whom: parts of saved chunks that several ranks want are read once, by one of them.

A chunk is cut into slabs (slabs.py). What only one rank wants, it reads for itself; of the other slabs each has one reader among
the ranks that want something of it, which gives every rank its boxes. Large ones are divided among their ranks. Small ones that
lie side by side in a file have the same reader where a request takes long (an object store), so that they are one request::

    file      |A A A B|A A A B|A A A B|A A A B| ...   chunks, each wanted by two ranks
    windows   |- read by A ---|- read by B ---| ...   as often by each as it wants something

Ranks that can write into each other's arenas are an island (the ranks of a node; a rank whose arena is on a GPU is one by
itself). To another island a slab goes once, as the smallest box that holds what is wanted there, to one of its ranks,
the relay, which gives the others theirs.

Everything here is a pure function of catalog, layouts and islands, so that all ranks decide alike without a word.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

from shardferry._gc import paused_gc
from shardferry.checkpoint.catalog import Catalog, TransformedItem
from shardferry.plan.planner import LoadPlan, PlannedTensor, ReadItem
from shardferry.plan.rank_layouts import Want, Wants
from shardferry.plan.split import Cut, Cutter, Delivery, SlabLimits, deliveries_of, ranks_of
from shardferry.region import Region

_GOLDEN = 0x9E3779B97F4A7C15  # the golden ratio's fraction, in 2**-64: its multiples lie evenly spread over a circle


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
        self._turns: dict[tuple[int, ...], dict[tuple[int, int], int]] = defaultdict(dict)  # by ranks and window
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
                place = _Place(row, chunk, items[0].chunk_shape, chunk + slab.index)
                self._add(place, slab, self._reader(slab, chunk, len(wants)))
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

    def _reader(self, slab: _Slab, chunk: int, num_wanting: int) -> int:
        """The world rank that reads a slab: another one begins for each chunk, or for each window of a file."""
        if not slab.shares:
            return slab.ranks[(slab.part + chunk % num_wanting) % len(slab.ranks)]
        file, start = int(self._catalog.chunk_file[chunk]), int(self._catalog.chunk_byte_offset[chunk])
        # All of these ranks go through their common slabs in the same order, and so count the same windows.
        turns = self._turns[slab.ranks]
        turn = slab.ranks[0] + turns.setdefault((file, start // self._limits.window_bytes), len(turns))
        place = (turn * _GOLDEN % 2**64) * slab.shares[-1] >> 64
        return slab.ranks[bisect_right(slab.shares, place)]

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
            deliveries = deliveries_of(wants, region)
            cutter = Cutter.of(chunk_shape, tensor.dtype.itemsize, self._limits, self._island)
            # What can't be read in ranges is decoded by one rank for all.
            cuts = list(cutter.cuts(deliveries)) if ranged else [cutter.whole(deliveries)]
            slabs = self._known[alike] = self._of_this_rank(cuts)
        return wants, slabs

    def _of_this_rank(self, cuts: Sequence[Cut]) -> list[_Slab]:
        if all(len(cut.deliveries) == 1 for cut in cuts):
            return []
        me = self._plan.world_rank
        mine = [(index, cut) for index, cut in enumerate(cuts) if any(d.world_rank == me for d in cut.deliveries)]
        return [_Slab.of(cut, index, me, self._island) for index, cut in mine]


@dataclass(frozen=True)
class _Group:
    """What an island wants of a slab."""

    ranks: tuple[int, ...]  # ascending
    deliveries: tuple[Delivery, ...]

    @classmethod
    def of(cls, deliveries: Sequence[Delivery]) -> _Group:
        return cls(ranks_of(deliveries), tuple(deliveries))

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
    ranks: tuple[int, ...]  # that want something of it
    mine: tuple[Delivery, ...]
    num_mine: int  # elements
    num_wanted: int  # elements, by all ranks together
    num_deliveries: int
    groups: dict[str, _Group]  # by island
    shares: Sequence[int]  # what its ranks want, summed up; elements; empty: it is not read with what lies beside it

    @classmethod
    def of(cls, cut: Cut, index: int, world_rank: int, island: Callable[[int], str]) -> _Slab:
        groups: dict[str, list[Delivery]] = defaultdict(list)
        for delivery in cut.deliveries:
            groups[island(delivery.world_rank)].append(delivery)
        mine = tuple(d for d in cut.deliveries if d.world_rank == world_rank)
        ranks = ranks_of(cut.deliveries)
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
            _shares(cut.deliveries, ranks) if cut.fits_window else (),
        )


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


def _shares(deliveries: Sequence[Delivery], ranks: Sequence[int]) -> list[int]:
    """What ranks want of a slab, summed up rank by rank; elements."""
    wanted = dict.fromkeys(ranks, 0)
    for delivery in deliveries:
        wanted[delivery.world_rank] += delivery.source.numel
    return list(accumulate(wanted.values()))
