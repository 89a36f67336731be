"""Hold the columns of a kept plan against what its rank wants and what the catalog has, before a byte is moved by them.

Columns come from a file, whose digest says that it is whole, not that its numbers are those of this plan. So each of them is
looked at: a read must lie in a chunk of its tensor, what is given on in what was read, each element must go where the layout of
the rank that gets it has that element, every rank of the island must get all that it wants of what is read for it, and all that
this rank wants must come from somewhere, once. Which of another island's ranks sends or relays is only held to be one of them:
to find out which it must be is most of the work that a kept plan saves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from shardferry.checkpoint.catalog import NO_FILE, Catalog
from shardferry.checkpoint.column_file import UnusableFile
from shardferry.checkpoint.ragged import Ragged
from shardferry.layout.tensor_layout import TensorLayout
from shardferry.plan.cooperative import Islands
from shardferry.plan.load_plan import LoadPlan
from shardferry.plan.plan_columns import COLUMNS, PlanColumns
from shardferry.plan.rank_layouts import Wants

_LARGEST = 2**62  # so that nothing below is more than 64 bits hold
_AT_ONCE = 1 << 18  # targets, so that columns in between stay small


def check_columns(
    columns: PlanColumns, plan: LoadPlan, catalog: Catalog, wants: Wants, islands: Islands | None
) -> None:
    """Check the columns of the part that a plan's rank has in shared reads; the arguments are those of `share_reads`.

    Raises:
        UnusableFile: some number can't be of such a plan; says which.
    """
    most_dims = max((len(tensor.layout.global_shape) for tensor in plan.tensors), default=0) or 1
    _require(columns.num_dims <= most_dims, "it has more dimensions than any tensor")
    _check_rows(columns, len(plan.tensors))
    _check_tables(columns)
    checker = _Checker(columns, plan, catalog, wants, islands)
    checker.check_chunks()
    checker.check_boxes()
    checker.check_ranks()
    checker.check_targets()
    checker.check_shares()
    checker.check_sums()


def _require(holds: bool | np.bool_, what: str) -> None:
    if not holds:
        raise UnusableFile(f"it is not this rank's plan: {what}")


def _check_rows(columns: PlanColumns, num_tensors: int) -> None:
    """Each row that is named is there, and the columns of a list have one length."""
    num_regions = len(columns.region_dims)
    num_rows = {
        "tensor": num_tensors,
        "region": num_regions,
        "shape": num_regions,
        "copy": len(columns.copy_region),
        "delivery": len(columns.delivery_rank),
        "group": len(columns.group_length),
    }
    lengths: dict[str, int] = {}
    for name in COLUMNS:
        prefix, _, kind = name.partition("_")
        column = getattr(columns, name)
        if kind in num_rows:
            _require(_within(column, 0, num_rows[kind]), f"{name} names a row that is not there")
        if prefix != "group":
            _require(len(column) == lengths.setdefault(prefix, len(column)), f"{name} has another length")
    for counts, members in (
        (columns.group_length, columns.group_delivery),
        (columns.shared_forwards, columns.forward_relay),
    ):
        _require((counts >= 0).all() and counts.sum() == len(members), "what is counted is not there")


def _check_tables(columns: PlanColumns) -> None:
    """Regions and copies have the dimensions that they say, and numbers that can be added; no delivery stands twice."""
    unused = np.arange(columns.num_dims) >= columns.region_dims[:, None]
    offsets, sizes, strides = columns.region_offsets, columns.region_sizes, columns.copy_strides
    _require(_within(columns.region_dims, 0, columns.num_dims + 1), "a region has other dimensions")
    _require((offsets[unused] == 0).all() and (sizes[unused] == 1).all(), "a region has other dimensions")
    _require((strides[unused[columns.copy_region]] == 0).all(), "a copy has other dimensions")
    _require(_within(offsets, 0, _LARGEST) and _within(sizes, 1, _LARGEST), "a region is empty, or lies outside")
    deliveries = columns.delivery_rank.astype(np.int64) * len(columns.copy_region) + columns.delivery_copy
    _require(len(np.unique(deliveries)) == len(deliveries), "a delivery stands twice")
    members = np.repeat(np.arange(len(columns.group_length)), columns.group_length)
    places = members * len(deliveries) + columns.group_delivery
    _require(len(np.unique(places)) == len(places), "a group has a delivery twice")


def _within(column: np.ndarray, start: int | np.ndarray, stop: int | np.ndarray) -> bool:
    return bool(((column >= start) & (column < stop)).all())


class _Checker:
    """What is asked of columns whose rows are there."""

    def __init__(
        self, columns: PlanColumns, plan: LoadPlan, catalog: Catalog, wants: Wants, islands: Islands | None
    ) -> None:
        self._columns = columns
        self._plan = plan
        self._catalog = catalog
        self._wants = wants
        self._islands = islands
        self._of_groups = Ragged(columns.group_delivery, columns.group_length)
        saved = [catalog.tensors[tensor.key] for tensor in plan.tensors]
        self._first_chunk = np.array([one.chunks.start for one in saved], dtype=np.int64)
        self._end_chunk = np.array([one.chunks.stop for one in saved], dtype=np.int64)
        self._first_entry = np.array([one.boxes_start for one in saved], dtype=np.int64)
        self._num_dims = np.array([len(one.shape) for one in saved], dtype=np.int64)

    def check_chunks(self) -> None:
        """Each chunk is one of its tensor, lies in a file, and has the shape; what is relayed lies in its chunk."""
        columns = self._columns
        tensor = np.concatenate([columns.own_tensor, columns.shared_tensor, columns.relayed_tensor])
        chunk = np.concatenate([columns.own_chunk, columns.shared_chunk, columns.relayed_chunk])
        region = np.concatenate([columns.own_shape, columns.shared_shape, columns.relayed_region])
        _require(_within(chunk, self._first_chunk[tensor], self._end_chunk[tensor]), "a chunk is another tensor's")
        _require((self._catalog.chunk_file[chunk] != NO_FILE).all(), "a chunk lies in no file")
        _require((columns.region_dims[region] == self._num_dims[tensor]).all(), "a chunk has other dimensions")
        saved, sizes = self._of_chunks(self._catalog.box_sizes, tensor, chunk, 1), columns.region_sizes[region]
        num_shapes = len(region) - len(columns.relayed_region)
        _require((sizes[:num_shapes] == saved[:num_shapes]).all(), "a chunk has another shape")
        _require((columns.region_offsets[region] + sizes <= saved)[num_shapes:].all(), "what is relayed is in no chunk")

    def _of_chunks(self, column: np.ndarray, tensor: np.ndarray, chunk: np.ndarray, fill: int) -> np.ndarray:
        """Rows of the catalog's box_offsets or box_sizes, filled up: ``int64[num_chunks, num_dims]``."""
        num_dims = self._num_dims[tensor]
        entry = self._first_entry[tensor] + (chunk - self._first_chunk[tensor]) * num_dims
        found = np.full((len(tensor), self._columns.num_dims), fill, dtype=np.int64)
        for dim in range(self._columns.num_dims):
            rows = np.flatnonzero(num_dims > dim)
            found[rows, dim] = column[entry[rows] + dim]
        return found

    def check_boxes(self) -> None:
        """What is read lies in its chunk, and what is given on in what is read."""
        columns = self._columns
        shapes = np.zeros_like(columns.region_offsets)  # of a shape only the sizes count
        self._check_inside(columns.copy_region[columns.own_copy], columns.own_shape, shapes)
        self._check_inside(columns.shared_region, columns.shared_shape, shapes)
        forwarding = np.repeat(columns.shared_region, columns.shared_forwards)
        self._check_inside(columns.forward_region, forwarding, columns.region_offsets)
        region = np.concatenate([columns.shared_region, columns.relayed_region]).astype(np.int64)
        group = np.concatenate([columns.shared_group, columns.relayed_group])
        pairs = np.unique(region * len(columns.group_length) + group)  # a thousand reads have one
        region, group = np.divmod(pairs, max(len(columns.group_length), 1))
        copies = columns.delivery_copy[self._of_groups.take(group).flat]
        around = np.repeat(region, columns.group_length[group])
        self._check_inside(columns.copy_region[copies], around, columns.region_offsets)

    def _check_inside(self, inner: np.ndarray, outer: np.ndarray, outer_offsets: np.ndarray) -> None:
        columns = self._columns
        begin, inner_begin = outer_offsets[outer], columns.region_offsets[inner]
        fits = (inner_begin >= begin) & (
            inner_begin - begin <= columns.region_sizes[outer] - columns.region_sizes[inner]
        )
        same_dims = columns.region_dims[inner] == columns.region_dims[outer]
        _require(fits.all() and same_dims.all(), "a box lies outside of that which it is in")

    def check_ranks(self) -> None:
        """Deliveries stay on this rank's island; what is forwarded goes to others, and what is relayed comes from others."""
        columns, here = self._columns, self._island(self._plan.world_rank)
        _require(all(self._island(rank) == here for rank in _distinct(columns.delivery_rank)), "a rank is elsewhere")
        others = {*_distinct(columns.forward_relay), *_distinct(columns.relayed_reader)}
        _require(all(self._island(rank) != here for rank in others), "a rank is on this island")

    def _island(self, world_rank: int) -> str:
        if self._islands is None:
            return ""
        _require(world_rank in self._islands, f"there is no rank {world_rank}")
        return self._islands[world_rank]

    def check_targets(self) -> None:
        """Each element goes where the rank that gets it has it."""
        columns = self._columns
        me = np.full(len(columns.own_copy), self._plan.world_rank)
        self._check_targets(columns.own_tensor, columns.own_chunk, me, columns.own_copy)
        for tensor, chunk, delivery in (self._deliveries, self._relayed_deliveries):
            self._check_targets(tensor, chunk, columns.delivery_rank[delivery], columns.delivery_copy[delivery])

    def _check_targets(self, tensor: np.ndarray, chunk: np.ndarray, rank: np.ndarray, copy: np.ndarray) -> None:
        layouts, of_target = self._layouts(tensor, rank)
        _require((of_target >= 0).all(), "a rank wants nothing of what it gets")
        places = _Places.of(layouts, self._columns.num_dims)
        for start in range(0, len(tensor), _AT_ONCE):
            here = slice(start, start + _AT_ONCE)
            begin = self._of_chunks(self._catalog.box_offsets, tensor[here], chunk[here], 0)
            _require(places.have(self._columns, begin, copy[here], of_target[here]), "an element goes elsewhere")

    def _layouts(self, tensor: np.ndarray, rank: np.ndarray) -> tuple[list[TensorLayout], np.ndarray]:
        """How each of some tensors lies on a rank: the layouts, each once, and for each tensor the row of its own, or -1."""
        ranks, rank_of = np.unique(rank, return_inverse=True)
        pair = tensor.astype(np.int64) * len(ranks) + rank_of
        row_of = np.zeros(len(self._plan.tensors) * len(ranks), dtype=np.int64)
        row_of[pair] = 1
        found: dict[int, int] = {}
        layouts: list[TensorLayout] = []
        for number in np.flatnonzero(row_of).tolist():
            planned, world_rank = self._plan.tensors[number // len(ranks)], int(ranks[number % len(ranks)])
            layout = self._wants.layout(planned, world_rank)
            if layout is not None and found.setdefault(id(layout), len(layouts)) == len(layouts):
                layouts.append(layout)
            row_of[number] = -1 if layout is None else found[id(layout)]
        return layouts, row_of[pair]

    def check_shares(self) -> None:
        """What is given on of a read is all that the ranks of this island want of it."""
        columns = self._columns
        ranks = {*_distinct(columns.delivery_rank), self._plan.world_rank}
        if self._islands is not None:
            ranks = {rank for rank in self._islands if self._island(rank) == self._island(self._plan.world_rank)}
        delivered = self._numel[columns.copy_region[columns.delivery_copy[columns.group_delivery]]]
        of_groups = Ragged(delivered, columns.group_length).sums()
        for tensor, chunk, region, group in (
            (columns.shared_tensor, columns.shared_chunk, columns.shared_region, columns.shared_group),
            (columns.relayed_tensor, columns.relayed_chunk, columns.relayed_region, columns.relayed_group),
        ):
            begin = self._of_chunks(self._catalog.box_offsets, tensor, chunk, 0) + columns.region_offsets[region]
            end = begin + columns.region_sizes[region]
            wanted = sum(self._wanted(rank, tensor, begin, end) for rank in ranks)
            _require((of_groups[group] == wanted).all(), "not all is given on that is wanted")

    def _wanted(self, world_rank: int, tensor: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Elements that a rank wants of some boxes of whole tensors."""
        layouts, rows = self._layouts(tensor, np.full(len(tensor), world_rank))
        return _Places.of(layouts, self._columns.num_dims).numel_within(begin, end, rows)

    @cached_property
    def _numel(self) -> np.ndarray:
        """Elements of each region."""
        numel: np.ndarray = np.prod(self._columns.region_sizes, axis=1, dtype=np.int64)
        return numel

    @cached_property
    def _deliveries(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tensor, chunk and delivery, of all that this rank reads for others and itself."""
        return self._expanded(self._columns.shared_tensor, self._columns.shared_chunk, self._columns.shared_group)

    @cached_property
    def _relayed_deliveries(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Alike, of what comes from other islands."""
        return self._expanded(self._columns.relayed_tensor, self._columns.relayed_chunk, self._columns.relayed_group)

    def _expanded(
        self, tensor: np.ndarray, chunk: np.ndarray, group: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        lengths = self._columns.group_length[group]
        return np.repeat(tensor, lengths), np.repeat(chunk, lengths), self._of_groups.take(group).flat

    def check_sums(self) -> None:
        """What this rank reads and gets is what it wants; what it gives is what it says."""
        columns, tensors = self._columns, self._plan.tensors
        numel = self._numel
        itemsize = np.array([tensor.dtype.itemsize for tensor in tensors], dtype=np.int64)
        wanted = np.array([tensor.layout.wanted_numel for tensor in tensors], dtype=np.int64)
        own = self._sum(columns.own_tensor, numel[columns.copy_region[columns.own_copy]])
        read, relayed = (self._mine(*found) for found in (self._deliveries, self._relayed_deliveries))
        _require((own + read + relayed <= wanted).all(), "a tensor gets more than is wanted of it")
        received = ((wanted - own - read) * itemsize).sum()
        _require(received == columns.bytes_received, "it gets another number of bytes than it wants")
        of_others = self._sum(columns.shared_tensor, columns.shared_wanted) - read
        _require((of_others * itemsize).sum() == columns.bytes_sent, "another number of bytes is sent")
        forwarding = np.repeat(columns.shared_tensor, columns.shared_forwards)
        forwarded = (numel[columns.forward_region] * itemsize[forwarding]).sum()
        _require(forwarded == columns.bytes_forwarded, "another number of bytes is forwarded")

    def _mine(self, tensor: np.ndarray, chunk: np.ndarray, delivery: np.ndarray) -> np.ndarray:
        """Elements that deliveries bring to this rank, by tensor."""
        mine = self._columns.delivery_rank[delivery] == self._plan.world_rank
        copies = self._columns.delivery_copy[delivery[mine]]
        return self._sum(tensor[mine], self._numel[self._columns.copy_region[copies]])

    def _sum(self, tensor: np.ndarray, numel: np.ndarray) -> np.ndarray:
        """Elements by tensor."""
        found = np.zeros(len(self._plan.tensors), dtype=np.int64)
        np.add.at(found, tensor, numel)
        return found


@dataclass(frozen=True, slots=True)
class _Places:
    """The boxes of some layouts, and where they lie in local tensors: a row a box, those of one layout together."""

    first: np.ndarray  # of each layout, a row
    counts: np.ndarray  # boxes of each layout
    begin: np.ndarray  # [num_boxes, num_dims] in the whole tensor, elements; filled up with 0
    end: np.ndarray  # alike, with 1
    offset: np.ndarray  # in the local tensor, elements
    strides: np.ndarray  # [num_boxes, num_dims] in the local tensor, elements; filled up with 0

    @classmethod
    def of(cls, layouts: Sequence[TensorLayout], num_dims: int) -> _Places:
        counts = np.array([len(layout.boxes) for layout in layouts], dtype=np.int64)
        boxes = [(box.region, *layout.destination(box)) for layout in layouts for box in layout.boxes]
        return cls(
            np.cumsum(counts) - counts,
            counts,
            _filled([region.offsets for region, _, _ in boxes], num_dims, 0),
            _filled([region.ends for region, _, _ in boxes], num_dims, 1),
            np.array([offset for _, offset, _ in boxes], dtype=np.int64),
            _filled([strides for _, _, strides in boxes], num_dims, 0),
        )

    def have(self, columns: PlanColumns, chunk_begin: np.ndarray, copy: np.ndarray, layout: np.ndarray) -> bool:
        """Whether each of some copies is of elements of one box of its layout, and puts them where they lie.

        Args:
            chunk_begin: where the chunk of each copy begins in the whole tensor.
            layout: of each copy, a row.
        """
        region = columns.copy_region[copy]
        begin = chunk_begin + columns.region_offsets[region]
        end = begin + columns.region_sizes[region]
        offset, strides = columns.copy_offset[copy], columns.copy_strides[copy]
        found = np.zeros(len(copy), dtype=bool)
        for rows, at in self._each(layout):
            inside = ((begin[rows] >= self.begin[at]) & (end[rows] <= self.end[at])).all(axis=1)
            target = self.offset[at] + ((begin[rows] - self.begin[at]) * self.strides[at]).sum(axis=1)
            found[rows] |= inside & (offset[rows] == target) & (strides[rows] == self.strides[at]).all(axis=1)
        return bool(found.all())

    def numel_within(self, begin: np.ndarray, end: np.ndarray, layout: np.ndarray) -> np.ndarray:
        """How many elements of each of some boxes of whole tensors the boxes of its layout have, ``int64[num_boxes]``.

        Args:
            layout: of each box, a row; -1 where there is none.
        """
        found = np.zeros(len(layout), dtype=np.int64)
        for rows, at in self._each(layout):
            common = np.minimum(end[rows], self.end[at]) - np.maximum(begin[rows], self.begin[at])
            found[rows] += np.prod(np.maximum(common, 0), axis=1)
        return found

    def _each(self, layout: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Which of some layouts have a first box, and the row of that; then alike of the second box, and so on."""
        has_layout = np.flatnonzero(layout >= 0)
        for number in range(int(self.counts.max(initial=0))):
            rows = has_layout[number < self.counts[layout[has_layout]]]
            yield rows, self.first[layout[rows]] + number


def _filled(rows: Sequence[tuple[int, ...]], num_dims: int, value: int) -> np.ndarray:
    filled = [(*row, *(value,) * (num_dims - len(row))) for row in rows]
    return np.array(filled, dtype=np.int64).reshape(len(rows), num_dims)


def _distinct(ranks: np.ndarray) -> list[int]:
    found: list[int] = np.unique(ranks).tolist()
    return found
