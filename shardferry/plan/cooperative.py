"""Assign reads to ranks: a part of a saved chunk that several ranks want is read once, by one of them.

Chunks are split into parts (split.py). A rank reads for itself what it alone wants. Every other part has one reader among the
ranks that want something of it; the reader gives each rank its boxes. Small parts that are neighbours in a file have the same
reader where a request takes long (an object store), so that they are one request::

    file      |A A A B|A A A B|A A A B|A A A B| ...   chunks, each wanted by ranks A and B
    windows   |------ A ------|------ B ------| ...   each rank reads about as many bytes as it wants

Ranks that write into each other's arenas form a memory group (the ranks of a node; a rank with its arena on a GPU is a group by
itself). A part goes to another memory group once, as the smallest box around everything that is wanted there. One rank of that group,
the relay, receives it and gives the others their boxes.

Where nodes have disks of their own, a file is read by ranks that have it: if possible by those that want something of the part, else
by any. The plan then also has what other ranks ask of this rank's files, see `shardferry.exchange.node_files`.

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
    # Hashes of what it gives to other ranks, less those of what it expects of them: those of all ranks add up to zero.
    balance: int = 0

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
RanksOfFiles = Mapping[int, frozenset[int]]  # by file, row of the catalog: the ranks that have it, where some lack it


def assign_reads(
    plan: LoadPlan,
    catalog: Catalog,
    layouts: RankLayouts,
    *,
    limits: SplitLimits,
    memory_groups: MemoryGroups | None = None,
    ranks_of_files: RanksOfFiles | None = None,
) -> CooperativePlan:
    """Divide the reads of some ranks among them; gives the part of the plan's own rank.

    Args:
        layouts: of all ranks that read for each other.
        limits: how large parts are, and which of them share a reader.
        memory_groups: by world rank; None where all ranks form one group.
        ranks_of_files: of the files that some ranks lack; None where all ranks have all files.
    """
    return _Assignment(
        plan, catalog, layouts, limits, memory_groups=memory_groups, ranks_of_files=ranks_of_files or {}
    ).result()


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


@dataclass
class _Assignment:
    """Collects one rank's part of the assignment, chunk by chunk."""

    plan: LoadPlan
    catalog: Catalog
    layouts: RankLayouts
    limits: SplitLimits
    memory_groups: MemoryGroups | None
    ranks_of_files: RanksOfFiles
    known: dict[tuple[object, ...], list[_SharedPart]] = field(default_factory=dict)  # most chunks look like some other
    # By the ranks that want something of a part, and those that may read it.
    windows: dict[tuple[tuple[int, ...], ...], _WindowReaders] = field(default_factory=dict)
    own: list[ReadItem] = field(default_factory=list)
    reads: list[CooperativeRead] = field(default_factory=list)
    num_forwarded: dict[int, int] = field(default_factory=lambda: defaultdict(int))  # by relay
    forwarded: dict[int, list[ForwardedBox]] = field(default_factory=lambda: defaultdict(list))  # by reader
    bytes_sent: int = 0
    bytes_received: int = 0
    bytes_forwarded: int = 0
    balance: int = 0

    def result(self) -> CooperativePlan:
        chunks: dict[tuple[int, int], list[ReadItem]] = defaultdict(list)
        for item in self.plan.reads:
            chunks[item.chunk, item.tensor].append(item)
        # In the order of chunks: a reader and its relay count the same boxes only where both go through them in one order.
        for _, items in sorted(chunks.items(), key=lambda entry: entry[0]):
            num_holders, parts = self._parts(items[0])
            if not parts:
                self.own += items
            for part in parts:
                self._add(items[0], part, self._reader(part, items[0].chunk, num_holders))
        return CooperativePlan(
            own=tuple(self.own),
            reads=tuple(self.reads),
            bytes_sent=self.bytes_sent,
            bytes_received=self.bytes_received,
            bytes_forwarded=self.bytes_forwarded,
            forwarded={reader: tuple(boxes) for reader, boxes in self.forwarded.items()},
            balance=self.balance,
        )

    def _parts(self, item: ReadItem) -> tuple[int, list[_SharedPart]]:
        """How many ranks hold something of a chunk, and its parts that this rank wants or may read; none where all read their own."""
        tensor = self.plan.tensors[item.tensor]
        itemsize = tensor.dtype.itemsize
        region = self.catalog.region(self.catalog.tensors[tensor.key], item.chunk)
        holders = self.layouts.holders(tensor, region)
        is_ranged = not isinstance(self.catalog.formats[self.catalog.chunk_format[item.chunk]], TransformedItem)
        have = self._ranks_with_file(item.chunk)
        same = (id(holders), region, itemsize, is_ranged, have)  # the layouts keep the holders alive
        if same not in self.known:
            parts = split_chunk(
                copies_of_ranks(holders, region),
                chunk_shape=item.chunk_shape,
                itemsize=itemsize,
                limits=self.limits,
                is_ranged=is_ranged,
                memory_group_of=self._memory_group_of,
                readable_by=have,
            )
            me, may_read = self.plan.world_rank, have is not None and self.plan.world_rank in have
            all_read = have is None or have.issuperset(rank for rank, _ in holders)
            is_shared = not all_read or any(len(part.copies) > 1 for part in parts)
            self.known[same] = [
                _SharedPart(part, index=index, world_rank=me, memory_group_of=self._memory_group_of)
                for index, part in enumerate(parts)
                if is_shared and (may_read or any(rank_copy.world_rank == me for rank_copy in part.copies))
            ]
        return len(holders), self.known[same]

    def _ranks_with_file(self, chunk: int) -> frozenset[int] | None:
        """The ranks that have a chunk's file; None where all have it."""
        return self.ranks_of_files.get(int(self.catalog.chunk_file[chunk])) if self.ranks_of_files else None

    def _memory_group_of(self, world_rank: int) -> str:
        return "" if self.memory_groups is None else self.memory_groups[world_rank]

    def _reader(self, shared: _SharedPart, chunk: int, num_holders: int) -> int:
        """The world rank that reads a part. Turns begin at another rank for each chunk, or for each window of a file."""
        readers, have = shared.ranks, self._ranks_with_file(chunk)
        if have is not None:
            readers = tuple(rank for rank in shared.ranks if rank in have) or tuple(sorted(have))
            num_holders = len(readers)
        if not shared.part.fits_window:
            return readers[(shared.part.turn + chunk % num_holders) % len(readers)]
        file, start = int(self.catalog.chunk_file[chunk]), int(self.catalog.chunk_byte_offset[chunk])
        # In the usual case rank k of n reads the k-th part of the files anyway: then its requests take these parts along.
        first = file * len(readers) // len(self.catalog.files)
        windows = self.windows.setdefault((shared.ranks, readers), _WindowReaders(readers))
        return windows.reader((file, start // self.limits.window_bytes), shared, first=first)

    def _add(self, item: ReadItem, shared: _SharedPart, reader: int) -> None:
        """Note what this rank does for a part of an item's chunk: read it, relay it, or wait for it."""
        itemsize, own_group = self.plan.tensors[item.tensor].dtype.itemsize, self._memory_group_of(self.plan.world_rank)
        here, part = shared.groups.get(own_group), (item.chunk, shared.part.region, reader)
        if reader != self.plan.world_rank:
            self.bytes_received += itemsize * shared.numel_own
            self.balance -= hash(part) * shared.numel_own
            is_from_outside = self._memory_group_of(reader) != own_group
            if here is not None and is_from_outside and _relay(here, item, shared) == self.plan.world_rank:
                box = ForwardedBox(item.tensor, item.chunk, here.box, itemsize, tuple(here.copies))
                self.balance -= hash((*part, Forward(self.plan.world_rank, here.box, len(self.forwarded[reader]))))
                self.forwarded[reader].append(box)
        elif len(shared.own) == len(shared.part.copies):
            self.own += [ReadItem(item.tensor, item.chunk, item.chunk_shape, copy) for copy in shared.own]
        else:
            self.bytes_sent += itemsize * (shared.numel_wanted - shared.numel_own)
            others = [group for name, group in shared.groups.items() if name != own_group]
            forwards = tuple(self._forward(group, _relay(group, item, shared), itemsize) for group in others)
            self.balance += hash(part) * (shared.numel_wanted - shared.numel_own)
            self.balance += sum(hash((*part, forward)) for forward in forwards)
            self.reads.append(
                CooperativeRead(
                    tensor=item.tensor,
                    chunk=item.chunk,
                    chunk_shape=item.chunk_shape,
                    region=shared.part.region,
                    copies=() if here is None else tuple(here.copies),
                    forwards=forwards,
                    numel_wanted=shared.numel_wanted,
                )
            )

    def _forward(self, group: _GroupCopies, relay: int, itemsize: int) -> Forward:
        index = self.num_forwarded[relay]
        self.num_forwarded[relay] += 1
        self.bytes_forwarded += group.box.numel * itemsize
        return Forward(relay, group.box, index)


def _relay(group: _GroupCopies, item: ReadItem, shared: _SharedPart) -> int:
    """The rank of a memory group that receives a part: another one for each part, so that all receive equally."""
    return group.ranks[(item.chunk + shared.index) % len(group.ranks)]


class _WindowReaders:
    """The readers of the windows that one set of ranks shares.

    A window goes to the rank that has read the least of what it wanted so far. All ranks of the set see the same parts in the
    same order, and so choose the same readers.

    Args:
        ranks: that may read.
    """

    def __init__(self, ranks: tuple[int, ...]) -> None:
        self._ranks = ranks
        self._readers: dict[tuple[int, int], int] = {}  # by file and window
        self._balance = dict.fromkeys(ranks, 0)  # elements wanted so far, less those that the rank reads

    def reader(self, window: tuple[int, int], shared: _SharedPart, *, first: int) -> int:
        """The world rank that reads a window, with ``shared`` as its next part; the ``first`` of the ranks wins ties."""
        balance = self._balance
        for rank, numel in zip(shared.ranks, shared.numel_by_rank, strict=True):
            if rank in balance:
                balance[rank] += numel
        if window not in self._readers:
            self._readers[window] = max((*self._ranks[first:], *self._ranks[:first]), key=balance.__getitem__)
        chosen = self._readers[window]
        balance[chosen] -= shared.numel_wanted
        return chosen
