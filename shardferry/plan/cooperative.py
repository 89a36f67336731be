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
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from shardferry.checkpoint.catalog import Catalog, TransformedItem
from shardferry.config import SplitLimits
from shardferry.plan.load_plan import LoadPlan, PlannedTensor, ReadItem
from shardferry.plan.split import (
    ChunkPart,
    MemoryGroupOf,
    RankAndLayout,
    RankCopy,
    copies_of_ranks,
    ranks_of,
    split_chunk,
)
from shardferry.region import Region


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


class _GroupCopies:
    """The copies of one memory group out of a part."""

    def __init__(self) -> None:
        self.copies: list[RankCopy] = []

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        return ranks_of(self.copies)

    @cached_property
    def box(self) -> Region:
        """The smallest box that holds everything of them, in the chunk. Worked out only for what is forwarded."""
        sources = [rank_copy.copy.source for rank_copy in self.copies]
        offsets = tuple(map(min, zip(*(source.offsets for source in sources), strict=True)))
        ends = tuple(map(max, zip(*(source.ends for source in sources), strict=True)))
        return Region(offsets, tuple(end - offset for end, offset in zip(ends, offsets, strict=True)))


class _SharedPart:
    """A part as one of its ranks sees it: the same for all chunks with the same region and the same holders."""

    def __init__(self, part: ChunkPart, *, index: int, world_rank: int, memory_group_of: MemoryGroupOf) -> None:
        self.part = part
        self.index = index  # in its chunk
        self.own = [rank_copy.copy for rank_copy in part.copies if rank_copy.world_rank == world_rank]
        self.groups: dict[str, _GroupCopies] = defaultdict(_GroupCopies)  # by memory group
        numel = dict.fromkeys(ranks_of(part.copies), 0)
        for rank_copy in part.copies:
            self.groups[memory_group_of(rank_copy.world_rank)].copies.append(rank_copy)
            numel[rank_copy.world_rank] += rank_copy.copy.source.numel
        self.ranks = tuple(numel)  # that want something of it, ascending
        self.numel_by_rank = tuple(numel.values())  # elements that each of them wants
        self.numel_own = numel.get(world_rank, 0)
        self.numel_wanted = sum(self.numel_by_rank)  # by all ranks together


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
        chunks: dict[tuple[int, int], list[ReadItem]] = defaultdict(list)
        for item in self._plan.reads:
            chunks[item.chunk, item.tensor].append(item)
        # In the order of chunks: a reader and its relay count the same boxes only where both go through them in one order.
        for _, items in sorted(chunks.items(), key=lambda entry: entry[0]):
            num_holders, parts = self._parts(items[0])
            if not parts:
                self._own += items
            for part in parts:
                self._add(items[0], part, self._reader(part, items[0].chunk, num_holders))
        return CooperativePlan(
            own=tuple(self._own),
            reads=tuple(self._reads),
            bytes_sent=self._bytes_sent,
            bytes_received=self._bytes_received,
            bytes_forwarded=self._bytes_forwarded,
            forwarded={reader: tuple(boxes) for reader, boxes in self._forwarded.items()},
        )

    def _parts(self, item: ReadItem) -> tuple[int, list[_SharedPart]]:
        """How many ranks hold something of a chunk, and its parts that this rank wants; none where all read their own."""
        tensor = self._plan.tensors[item.tensor]
        itemsize = tensor.dtype.itemsize
        region = self._catalog.region(self._catalog.tensors[tensor.key], item.chunk)
        holders = self._layouts.holders(tensor, region)
        is_ranged = not isinstance(self._catalog.formats[self._catalog.chunk_format[item.chunk]], TransformedItem)
        same = (id(holders), region, itemsize, is_ranged)  # the layouts keep the holders alive
        if same not in self._known:
            parts = split_chunk(
                copies_of_ranks(holders, region),
                chunk_shape=item.chunk_shape,
                itemsize=itemsize,
                limits=self._limits,
                is_ranged=is_ranged,
                memory_group_of=self._memory_group_of,
            )
            self._known[same] = self._own_parts(parts)
        return len(holders), self._known[same]

    def _own_parts(self, parts: list[ChunkPart]) -> list[_SharedPart]:
        if all(len(part.copies) == 1 for part in parts):
            return []
        me = self._plan.world_rank
        return [
            _SharedPart(part, index=index, world_rank=me, memory_group_of=self._memory_group_of)
            for index, part in enumerate(parts)
            if any(rank_copy.world_rank == me for rank_copy in part.copies)
        ]

    def _memory_group_of(self, world_rank: int) -> str:
        return "" if self._memory_groups is None else self._memory_groups[world_rank]

    def _reader(self, shared: _SharedPart, chunk: int, num_holders: int) -> int:
        """The world rank that reads a part. Turns begin at another rank for each chunk, or for each window of a file."""
        if not shared.part.fits_window:
            return shared.ranks[(shared.part.turn + chunk % num_holders) % len(shared.ranks)]
        file, start = int(self._catalog.chunk_file[chunk]), int(self._catalog.chunk_byte_offset[chunk])
        # In the usual case rank k of n reads the k-th part of the files anyway: then its requests take these parts along.
        first = file * len(shared.ranks) // len(self._catalog.files)
        return self._windows[shared.ranks].reader((file, start // self._limits.window_bytes), shared, first=first)

    def _add(self, item: ReadItem, shared: _SharedPart, reader: int) -> None:
        """Note what this rank does for a part of an item's chunk: read it, relay it, or wait for it."""
        itemsize = self._plan.tensors[item.tensor].dtype.itemsize
        if reader != self._plan.world_rank:
            self._bytes_received += itemsize * shared.numel_own
            here = shared.groups[self._own_group]
            is_from_outside = len(shared.groups) > 1 and self._memory_group_of(reader) != self._own_group
            if is_from_outside and _relay(here, item, shared) == self._plan.world_rank:
                box = ForwardedBox(item.tensor, item.chunk, here.box, itemsize, tuple(here.copies))
                self._forwarded[reader].append(box)
        elif len(shared.own) == len(shared.part.copies):
            self._own += [ReadItem(item.tensor, item.chunk, item.chunk_shape, copy) for copy in shared.own]
        else:
            self._bytes_sent += itemsize * (shared.numel_wanted - shared.numel_own)
            others = [group for name, group in shared.groups.items() if name != self._own_group]
            self._reads.append(
                CooperativeRead(
                    tensor=item.tensor,
                    chunk=item.chunk,
                    chunk_shape=item.chunk_shape,
                    region=shared.part.region,
                    copies=tuple(shared.groups[self._own_group].copies),
                    forwards=tuple(self._forward(group, _relay(group, item, shared), itemsize) for group in others),
                    numel_wanted=shared.numel_wanted,
                )
            )

    def _forward(self, group: _GroupCopies, relay: int, itemsize: int) -> Forward:
        index = self._num_forwarded[relay]
        self._num_forwarded[relay] += 1
        self._bytes_forwarded += group.box.numel * itemsize
        return Forward(relay, group.box, index)


def _relay(group: _GroupCopies, item: ReadItem, shared: _SharedPart) -> int:
    """The rank of a memory group that receives a part: another one for each part, so that all receive equally."""
    return group.ranks[(item.chunk + shared.index) % len(group.ranks)]


class _WindowReaders:
    """The readers of the windows that one set of ranks shares.

    A window goes to the rank that has read the least of what it wanted so far. All ranks of the set see the same parts in the
    same order, and so choose the same readers.
    """

    def __init__(self) -> None:
        self._readers: dict[tuple[int, int], int] = {}  # file and window: position in the ranks
        self._balance: list[int] = []  # elements wanted so far, less those that the rank reads; by position

    def reader(self, window: tuple[int, int], shared: _SharedPart, *, first: int) -> int:
        """The world rank that reads a window, with ``shared`` as its next part; the ``first`` of the ranks wins ties."""
        num_ranks = len(shared.ranks)
        balance = self._balance = self._balance or [0] * num_ranks
        for position, numel in enumerate(shared.numel_by_rank):
            balance[position] += numel
        if window not in self._readers:
            positions = (position % num_ranks for position in range(first, first + num_ranks))
            self._readers[window] = max(positions, key=balance.__getitem__)
        chosen = self._readers[window]
        balance[chosen] -= shared.numel_wanted
        return shared.ranks[chosen]
