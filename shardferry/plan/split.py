"""Split a saved chunk into parts, each contiguous in its file, by the set of ranks that want something of it.

A chunk is split along its outermost dimension wherever the set of ranks changes::

    chunk (4, 4), saved by rows; two ranks want one column half each, and a third one row 3
    row 0  |A A B B|
    row 1  |A A B B|      part [0:3, 0:4] for ranks A and B: one of them reads all of it
    row 2  |A A B B|
    row 3  |A C B C|      part [3:4, 0:4] for A, B and C

A large part is divided among its ranks. Where a request takes long (an object store), neighbouring rows that ranks of one
memory group want stay one part, as long as they fit a window: see `shardferry.plan.cooperative`, which chooses the readers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from operator import itemgetter

from shardferry.config import SplitLimits
from shardferry.layout.tensor_layout import LocalRegion, TensorLayout
from shardferry.region import BoxCopy, Region

RankAndLayout = tuple[int, TensorLayout]  # world rank, and the tensor's layout there
MemoryGroupOf = Callable[[int], str]  # by world rank; ranks with the same answer write into each other's arenas


@dataclass(frozen=True, slots=True)
class RankCopy:
    """One rank's copy out of a chunk."""

    world_rank: int
    copy: BoxCopy


@dataclass(frozen=True, slots=True)
class ChunkPart:
    """A contiguous part of a chunk that one rank reads, and the copies out of it."""

    region: Region  # in the chunk, elements
    copies: tuple[RankCopy, ...]
    turn: int = 0  # counts the parts that are divided among the same ranks
    fits_window: bool = False  # small: it is read together with its neighbours in the file


def copies_of_ranks(layouts: Sequence[RankAndLayout], chunk: Region) -> list[RankCopy]:
    """Every copy that ranks make out of a chunk, rank by rank. Equal layouts, given as one object, are worked out once."""
    known: dict[int, list[BoxCopy]] = {}  # by id; the caller keeps the layouts alive
    found: list[RankCopy] = []
    for world_rank, layout in layouts:
        copies = known.get(id(layout))
        if copies is None:
            copies = known[id(layout)] = copies_out_of(chunk, layout)
        found += [RankCopy(world_rank, copy) for copy in copies]
    return found


def copies_out_of(chunk: Region, layout: TensorLayout) -> list[BoxCopy]:
    """The copies that fill what a local tensor has of a chunk."""
    return [copy for box in layout.boxes if (copy := copy_to_box(chunk, layout, box)) is not None]


def copy_to_box(chunk: Region, layout: TensorLayout, box: LocalRegion) -> BoxCopy | None:
    """The copy that fills what one box of a local tensor has of a chunk; None where the two share no element."""
    common = chunk.intersect(box.region)
    if common is None:
        return None
    start, strides = layout.destination(box)
    inside = common.relative_to(box.region.offsets)
    offset = start + sum(o * s for o, s in zip(inside.offsets, strides, strict=True))
    return BoxCopy(common.relative_to(chunk.offsets), offset, strides)


def ranks_of(copies: Iterable[RankCopy]) -> tuple[int, ...]:
    """World ranks, ascending, each once."""
    return tuple(sorted({copy.world_rank for copy in copies}))


def split_chunk(
    copies: Sequence[RankCopy],
    *,
    chunk_shape: tuple[int, ...],
    itemsize: int,
    limits: SplitLimits,
    is_ranged: bool,
    memory_group_of: MemoryGroupOf,
    readable_by: frozenset[int] | None,
) -> list[ChunkPart]:
    """Split one chunk by the copies out of it.

    Args:
        itemsize: bytes of an element.
        is_ranged: whether the chunk's item can be read in ranges. If not, it is one part: one rank decodes it for all.
        readable_by: the ranks that have the chunk's file; None where all have it.

    Returns:
        The parts in the order of the chunk's rows. Every copy is in them, element by element, exactly once.
    """
    if not is_ranged or not chunk_shape:
        fits = math.prod(chunk_shape) * itemsize <= limits.window_bytes
        return [ChunkPart(Region.whole(chunk_shape), tuple(copies), fits_window=fits)]
    return list(_Splitter(chunk_shape, itemsize, limits, memory_group_of, readable_by).parts(copies))


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of a chunk between two positions where the set of ranks changes."""

    start: int
    stop: int
    copies: list[RankCopy]  # that take something of these rows


class _Splitter:
    """Splits one chunk along its outermost dimension with more than one row."""

    def __init__(
        self,
        chunk_shape: tuple[int, ...],
        itemsize: int,
        limits: SplitLimits,
        memory_group_of: MemoryGroupOf,
        readable_by: frozenset[int] | None,
    ) -> None:
        self._chunk_shape = chunk_shape
        self._itemsize = itemsize
        self._limits = limits
        self._memory_group_of = memory_group_of
        self._readable_by = readable_by
        self._dim = next((dim for dim, size in enumerate(chunk_shape) if size > 1), 0)
        self._row_shape = chunk_shape[self._dim + 1 :]
        self._row_bytes = math.prod(self._row_shape) * itemsize

    def parts(self, copies: Sequence[RankCopy]) -> Iterator[ChunkPart]:
        rows = self._rows_by_ranks(copies)
        for some in self._joined(rows) if self._limits.window_bytes else rows:
            yield from self._divided(some)

    def _rows_by_ranks(self, copies: Sequence[RankCopy]) -> Iterator[_Rows]:
        """Rows in order, each with the copies that take something of it."""
        dim = self._dim
        regions = [rank_copy.copy.source for rank_copy in copies]
        bounds = sorted({bound for region in regions for bound in (region.offsets[dim], region.ends[dim])})
        waiting = sorted(enumerate(copies), key=lambda entry: regions[entry[0]].offsets[dim], reverse=True)
        here: list[tuple[int, RankCopy]] = []
        for start, stop in pairwise(bounds):
            while waiting and regions[waiting[-1][0]].offsets[dim] <= start:
                here.append(waiting.pop())
            here = sorted((entry for entry in here if regions[entry[0]].ends[dim] > start), key=itemgetter(0))
            if here:
                yield _Rows(start, stop, [rank_copy for _, rank_copy in here])

    def _joined(self, all_rows: Iterable[_Rows]) -> Iterator[_Rows]:
        """Join neighbours that one memory group wants whole, up to a window's size."""
        last: tuple[_Rows, str | None] | None = None  # with the memory group that wants them
        for rows in all_rows:
            wanted_by = self._only_memory_group(rows)
            if last is not None:
                before, group = last
                fits = (rows.stop - before.start) * self._row_bytes <= self._limits.window_bytes
                if fits and before.stop == rows.start and group is not None and group == wanted_by:
                    later = [c for c in rows.copies if c.copy.source.offsets[self._dim] == rows.start]
                    rows = _Rows(before.start, rows.stop, before.copies + later)
                else:
                    yield before
            last = rows, wanted_by
        if last is not None:
            yield last[0]

    def _only_memory_group(self, rows: _Rows) -> str | None:
        """The one memory group that wants whole rows; None where the rows must not be joined with others.

        One rank's long run is not joined: that rank reads it in place.
        """
        memory_groups = {self._memory_group_of(rank_copy.world_rank) for rank_copy in rows.copies}
        if len(memory_groups) > 1 or all(c.copy.source.sizes[self._dim + 1 :] != self._row_shape for c in rows.copies):
            return None
        is_long = (rows.stop - rows.start) * self._row_bytes >= self._limits.long_run_bytes
        return None if is_long and len(ranks_of(rows.copies)) == 1 else memory_groups.pop()

    def _divided(self, rows: _Rows) -> Iterator[ChunkPart]:
        """Divide rows among the ranks that want something of them."""
        copies = self._within(rows.copies, rows.start, rows.stop)
        ranks = ranks_of(copies)
        all_read = self._readable_by is None or self._readable_by.issuperset(ranks)
        if all_read and (len(ranks) == 1 or self._share_nothing(copies)):
            for rank in ranks:
                own = tuple(rank_copy for rank_copy in copies if rank_copy.world_rank == rank)
                yield ChunkPart(self._region(rows.start, rows.stop), own)
            return
        num_rows = rows.stop - rows.start
        nbytes, window_bytes = num_rows * self._row_bytes, self._limits.window_bytes
        num_turns = min(len(ranks), max(1, nbytes // max(self._limits.min_part_bytes, window_bytes)), num_rows)
        step = max(1, self._limits.max_part_bytes // max(self._row_bytes, 1))
        for turn in range(num_turns):
            begin, end = (rows.start + num_rows * edge // num_turns for edge in (turn, turn + 1))
            for first in range(begin, end, step):
                last = min(first + step, end)
                here = tuple(self._within(copies, first, last))
                yield ChunkPart(self._region(first, last), here, turn, fits_window=nbytes <= window_bytes)

    def _within(self, copies: Sequence[RankCopy], start: int, stop: int) -> list[RankCopy]:
        parts = ((c.world_rank, c.copy.within(self._dim, start, stop)) for c in copies)
        return [RankCopy(world_rank, copy) for world_rank, copy in parts if copy is not None]

    def _region(self, start: int, stop: int) -> Region:
        offsets = (*(0,) * self._dim, start, *(0,) * len(self._row_shape))
        return Region(offsets, (*self._chunk_shape[: self._dim], stop - start, *self._row_shape))

    def _share_nothing(self, copies: Sequence[RankCopy]) -> bool:
        """Whether no element is wanted twice and every contiguous run is long: then each rank reads its own."""
        boxes = [rank_copy.copy.source for rank_copy in copies]
        if any(self._run_bytes(box) < self._limits.long_run_bytes for box in boxes):
            return False
        return all(one.intersect(other) is None for one, other in combinations(boxes, 2))

    def _run_bytes(self, box: Region) -> int:
        """Bytes of the box that are contiguous in a row-major chunk."""
        run = self._itemsize
        for size, whole in zip(reversed(box.sizes), reversed(self._chunk_shape), strict=True):
            run *= size
            if size < whole:
                break
        return run
