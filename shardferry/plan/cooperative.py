"""Assign reads to ranks: a part of a saved chunk that several ranks want is read once, by one of them.

Chunks are split into parts (split.py). A rank reads for itself what it alone wants. Every other part has one reader among the
ranks that want something of it; the reader gives each rank its boxes. Small parts that are neighbours in a file have the same
reader where a request takes long (an object store), so that they are one request::

    file      |A A A B|A A A B|A A A B|A A A B| ...   chunks, each wanted by ranks A and B
    windows   |------ A ------|------ B ------| ...   each rank reads about as many bytes as it wants

Ranks that write into each other's arenas form a memory group (the ranks of a node; a rank with its arena on a GPU is a group by
itself). A part goes to another memory group once, as the smallest box around everything that is wanted there. One rank of that group,
the relay, receives it and gives the others their boxes.

Pure and deterministic: every rank computes the same assignment without communication.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from shardferry.checkpoint.catalog import Catalog, TransformedItem
from shardferry.config import SplitLimits
from shardferry.plan.load_plan import LoadPlan, PlannedTensor, ReadItem
from shardferry.plan.split import (
    ChunkPart,
    RankAndLayout,
    RankCopy,
    copies_of_ranks,
    ranks_of,
    split_chunk,
    whole_chunk,
)
from shardferry.region import BoxCopy, Region


@dataclass(frozen=True, slots=True)
class Forward:
    """A box of a part on its way to another memory group."""

    relay: int  # world rank that receives it
    box: Region  # in the chunk, elements; it travels packed, row-major
    index: int  # its position among all boxes from this reader to this relay


@dataclass(frozen=True, slots=True)
class CooperativeRead:
    """A part of one chunk that this rank reads for several ranks."""

    tensor: int  # row of LoadPlan.tensors
    chunk: int  # row of the catalog
    chunk_shape: tuple[int, ...]
    region: Region  # in the chunk, elements
    copies: tuple[RankCopy, ...]  # of ranks in its memory group
    forwards: tuple[Forward, ...]
    numel_wanted: int  # elements, by all ranks together


@dataclass(frozen=True, slots=True)
class ForwardedBox:
    """A box that arrives from a reader in another memory group, for ranks of this one."""

    tensor: int  # row of LoadPlan.tensors
    chunk: int  # row of the catalog
    box: Region  # in the chunk, elements
    itemsize: int  # bytes
    copies: tuple[RankCopy, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the packed box."""
        return self.box.numel * self.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class CooperativePlan:
    """One rank's part in the reads of all ranks that read for each other."""

    own: tuple[ReadItem, ...]  # that it reads for itself
    reads: tuple[CooperativeRead, ...]  # that it reads for others, or for others and itself
    bytes_sent: int  # read by it, wanted by other ranks
    bytes_received: int  # wanted by it, read by other ranks
    bytes_forwarded: int = 0  # sent through the process group, to other memory groups
    forwarded: Mapping[int, tuple[ForwardedBox, ...]] = field(
        default_factory=dict
    )  # by the reader's world rank, in order

    @property
    def relays(self) -> frozenset[int]:
        """World ranks of other memory groups that this rank sends to."""
        return frozenset(forward.relay for read in self.reads for forward in read.forwards)


class RankLayouts(Protocol):
    """The layouts of all ranks that read for each other."""

    def holders(self, tensor: PlannedTensor, region: Region) -> tuple[RankAndLayout, ...]:
        """The ranks that hold an element of a region of a tensor, ascending, each with its layout.

        Tensors with the same layouts and the same region get the same object, which is kept.
        """


MemoryGroups = Mapping[int, str]  # by world rank; ranks with the same name write into each other's arenas


def assign_reads(
    plan: LoadPlan,
    catalog: Catalog,
    layouts: RankLayouts,
    *,
    limits: SplitLimits,
    memory_groups: MemoryGroups | None = None,
) -> CooperativePlan:
    """Divide the reads of some ranks among them; gives the part of the plan's own rank.

    Args:
        layouts: of all ranks that read for each other.
        limits: how large parts are, and which of them share a reader.
        memory_groups: by world rank; None where all ranks form one group.
    """
    return _Assignment(plan, catalog, layouts, limits, memory_groups).result()


class _Assignment:
    """Collects one rank's part of the assignment, chunk by chunk."""

    def __init__(
        self,
        plan: LoadPlan,
        catalog: Catalog,
        layouts: RankLayouts,
        limits: SplitLimits,
        memory_groups: MemoryGroups | None,
    ) -> None:
        self._plan = plan
        self._catalog = catalog
        self._layouts = layouts
        self._limits = limits
        self._memory_groups = memory_groups
        self._own_group = self._memory_group_of(plan.world_rank)
        self._known: dict[tuple[object, ...], list[_SharedPart]] = {}  # most chunks look like some other
        self._windows: dict[tuple[int, ...], _WindowReaders] = defaultdict(_WindowReaders)  # by the ranks of a part
        self._own: list[ReadItem] = []
        self._reads: list[CooperativeRead] = []
        self._num_forwarded: dict[int, int] = defaultdict(int)  # by relay
        self._forwarded: dict[int, list[ForwardedBox]] = defaultdict(list)  # by reader
        self._bytes_sent = self._bytes_received = self._bytes_forwarded = 0

    def result(self) -> CooperativePlan:
        # In the order of chunks: a reader and its relay count the same boxes only where both go through them in one order.
        for (row, chunk), items in sorted(_by_chunk(self._plan.reads).items(), key=lambda entry: entry[0][1]):
            num_holders, parts = self._parts(self._plan.tensors[row], chunk, items[0].chunk_shape)
            if not parts:
                self._own += items
            for part in parts:
                place = _ChunkOfTensor(row, chunk, items[0].chunk_shape, chunk + part.index)
                self._add(place, part, self._reader(part, chunk, num_holders))
        return CooperativePlan(
            own=tuple(self._own),
            reads=tuple(self._reads),
            bytes_sent=self._bytes_sent,
            bytes_received=self._bytes_received,
            bytes_forwarded=self._bytes_forwarded,
            forwarded={reader: tuple(boxes) for reader, boxes in self._forwarded.items()},
        )

    def _add(self, place: _ChunkOfTensor, part: _SharedPart, reader: int) -> None:
        itemsize = self._plan.tensors[place.tensor].dtype.itemsize
        if reader != self._plan.world_rank:
            self._bytes_received += itemsize * part.numel_own
            self._relay(place, part, reader, itemsize)
            return
        if len(part.own) == part.num_copies:
            self._own += [ReadItem(place.tensor, place.chunk, place.chunk_shape, copy) for copy in part.own]
            return
        self._bytes_sent += itemsize * (part.numel_wanted - part.numel_own)
        others = [group for name, group in part.groups.items() if name != self._own_group]
        self._reads.append(
            CooperativeRead(
                tensor=place.tensor,
                chunk=place.chunk,
                chunk_shape=place.chunk_shape,
                region=part.region,
                copies=part.groups[self._own_group].copies,
                forwards=tuple(self._forward(place, group, itemsize) for group in others),
                numel_wanted=part.numel_wanted,
            )
        )

    def _reader(self, part: _SharedPart, chunk: int, num_holders: int) -> int:
        """The world rank that reads a part. Turns begin at another rank for each chunk, or for each window of a file."""
        if not part.fits_window:
            return part.ranks[(part.turn + chunk % num_holders) % len(part.ranks)]
        file, start = int(self._catalog.chunk_file[chunk]), int(self._catalog.chunk_byte_offset[chunk])
        # In the usual case rank k of n reads the k-th part of the files anyway: then its requests take these parts along.
        first = file * len(part.ranks) // len(self._catalog.files)
        return self._windows[part.ranks].reader((file, start // self._limits.window_bytes), part, first=first)

    def _memory_group_of(self, world_rank: int) -> str:
        return "" if self._memory_groups is None else self._memory_groups[world_rank]

    def _forward(self, place: _ChunkOfTensor, group: _GroupCopies, itemsize: int) -> Forward:
        relay = place.relay(group)
        index = self._num_forwarded[relay]
        self._num_forwarded[relay] += 1
        self._bytes_forwarded += group.box.numel * itemsize
        return Forward(relay, group.box, index)

    def _relay(self, place: _ChunkOfTensor, part: _SharedPart, reader: int, itemsize: int) -> None:
        """Note the box that another memory group's reader sends to this rank."""
        if len(part.groups) == 1:
            return
        here = part.groups[self._own_group]
        if self._memory_group_of(reader) != self._own_group and place.relay(here) == self._plan.world_rank:
            box = ForwardedBox(place.tensor, place.chunk, here.box, itemsize, here.copies)
            self._forwarded[reader].append(box)

    def _parts(self, tensor: PlannedTensor, chunk: int, chunk_shape: tuple[int, ...]) -> tuple[int, list[_SharedPart]]:
        """How many ranks hold something of a chunk, and its parts that this rank wants; none where all read their own."""
        region = self._catalog.region(self._catalog.tensors[tensor.key], chunk)
        holders = self._layouts.holders(tensor, region)
        is_ranged = not isinstance(self._catalog.formats[self._catalog.chunk_format[chunk]], TransformedItem)
        same = (id(holders), region, tensor.dtype.itemsize, is_ranged)  # the layouts keep the holders alive
        parts = self._known.get(same)
        if parts is None:
            copies = copies_of_ranks(holders, region)
            parts = self._known[same] = self._own_parts(self._split(copies, chunk_shape, tensor, is_ranged=is_ranged))
        return len(holders), parts

    def _split(
        self, copies: Sequence[RankCopy], chunk_shape: tuple[int, ...], tensor: PlannedTensor, *, is_ranged: bool
    ) -> list[ChunkPart]:
        itemsize, limits = tensor.dtype.itemsize, self._limits
        if not is_ranged:  # one rank decodes the item for all
            return [whole_chunk(copies, chunk_shape=chunk_shape, itemsize=itemsize, limits=limits)]
        return split_chunk(
            copies,
            chunk_shape=chunk_shape,
            itemsize=itemsize,
            limits=limits,
            memory_group_of=self._memory_group_of,
        )

    def _own_parts(self, parts: Sequence[ChunkPart]) -> list[_SharedPart]:
        """The parts that this rank wants something of; none where no part is wanted by two copies."""
        if all(len(part.copies) == 1 for part in parts):
            return []
        me = self._plan.world_rank
        return [
            _SharedPart.of(part, index=index, world_rank=me, memory_group_of=self._memory_group_of)
            for index, part in enumerate(parts)
            if any(rank_copy.world_rank == me for rank_copy in part.copies)
        ]


@dataclass(frozen=True)
class _GroupCopies:
    """The copies of one memory group out of a part."""

    ranks: tuple[int, ...]  # ascending
    copies: tuple[RankCopy, ...]

    @cached_property
    def box(self) -> Region:
        """The smallest box that holds everything of them, in the chunk. Worked out only for what is forwarded."""
        sources = [rank_copy.copy.source for rank_copy in self.copies]
        offsets = tuple(map(min, zip(*(source.offsets for source in sources), strict=True)))
        ends = tuple(map(max, zip(*(source.ends for source in sources), strict=True)))
        return Region(offsets, tuple(end - offset for end, offset in zip(ends, offsets, strict=True)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _SharedPart:
    """A part as one of its ranks sees it: the same for all chunks with the same region and the same holders."""

    index: int  # in its chunk
    region: Region  # in the chunk, elements
    turn: int
    fits_window: bool
    ranks: tuple[int, ...]  # that want something of it
    numel_by_rank: tuple[int, ...]  # elements that each of them wants
    own: tuple[BoxCopy, ...]
    numel_own: int
    numel_wanted: int  # elements, by all ranks together
    num_copies: int
    groups: dict[str, _GroupCopies]  # by memory group

    @classmethod
    def of(cls, part: ChunkPart, *, index: int, world_rank: int, memory_group_of: Callable[[int], str]) -> _SharedPart:
        groups: dict[str, list[RankCopy]] = defaultdict(list)
        numel: dict[int, int] = dict.fromkeys(ranks_of(part.copies), 0)
        for rank_copy in part.copies:
            groups[memory_group_of(rank_copy.world_rank)].append(rank_copy)
            numel[rank_copy.world_rank] += rank_copy.copy.source.numel
        own = tuple(rank_copy.copy for rank_copy in part.copies if rank_copy.world_rank == world_rank)
        return cls(
            index=index,
            region=part.region,
            turn=part.turn,
            fits_window=part.fits_window,
            ranks=tuple(numel),
            numel_by_rank=tuple(numel.values()),
            own=own,
            numel_own=sum(copy.source.numel for copy in own),
            numel_wanted=sum(numel.values()),
            num_copies=len(part.copies),
            groups={name: _GroupCopies(ranks_of(copies), tuple(copies)) for name, copies in groups.items()},
        )


@dataclass(frozen=True, slots=True)
class _ChunkOfTensor:
    """A chunk of a planned tensor, and whose turn it is."""

    tensor: int  # row of LoadPlan.tensors
    chunk: int  # row of the catalog
    chunk_shape: tuple[int, ...]
    turn: int

    def relay(self, group: _GroupCopies) -> int:
        """The rank of a memory group that receives the part: another one for each part, so that all receive equally."""
        return group.ranks[self.turn % len(group.ranks)]


class _WindowReaders:
    """The readers of the windows that one set of ranks shares.

    A window goes to the rank that has read the least of what it wanted so far. All ranks of the set see the same parts in the
    same order, and so choose the same readers.
    """

    def __init__(self) -> None:
        self._readers: dict[tuple[int, int], int] = {}  # file and window: position in the ranks
        self._balance: list[int] = []  # elements wanted so far, less those that the rank reads; by position

    def reader(self, window: tuple[int, int], part: _SharedPart, *, first: int) -> int:
        """The world rank that reads a window, with ``part`` as its next part; the ``first`` of the ranks wins ties."""
        balance = self._balance = self._balance or [0] * len(part.ranks)
        for position, numel in enumerate(part.numel_by_rank):
            balance[position] += numel
        if window not in self._readers:
            num_ranks = len(part.ranks)
            self._readers[window] = (
                max(range(first, first + num_ranks), key=lambda p: balance[p % num_ranks]) % num_ranks
            )
        chosen = self._readers[window]
        balance[chosen] -= part.numel_wanted
        return part.ranks[chosen]


def _by_chunk(reads: Sequence[ReadItem]) -> dict[tuple[int, int], list[ReadItem]]:
    chunks: dict[tuple[int, int], list[ReadItem]] = {}
    for item in reads:
        chunks.setdefault((item.tensor, item.chunk), []).append(item)
    return chunks
