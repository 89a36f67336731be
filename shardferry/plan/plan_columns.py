"""Turn one rank's part of shared reads into columns of integers and back: most of them look like some other, which is said once.

There are five tables of what occurs once or a thousand times, and four lists of what is done, in order, that name their rows::

    regions     boxes of a chunk; as a chunk's shape, only the sizes count
    copies      a region, and where it goes in a local tensor
    deliveries  a copy, and the rank that it is for
    groups      deliveries that belong together
    own         tensor, chunk, the chunk's shape, copy             of a `ReadItem`
    shared      tensor, chunk, the chunk's shape, region, group    of a `SharedRead`
    forwards    relay, region                                      of a `Forward`; those of one read after those of the one before
    relayed     reader, tensor, chunk, region, group               of a `Relayed`
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any

import numpy as np

from shardferry.plan.cooperative import Forward, Relayed, SharedPlan, SharedRead
from shardferry.plan.load_plan import PlannedTensor, ReadItem
from shardferry.plan.split import Delivery
from shardferry.region import Region

# What is in elements, or a chunk's row in the catalog; all else numbers rows and ranks.
_LONG = {
    *("region_offsets", "region_sizes", "copy_offset", "copy_strides"),
    *("own_chunk", "shared_chunk", "shared_wanted", "relayed_chunk"),
}
_WIDE = ("region_offsets", "region_sizes", "copy_strides")  # of two dimensions


@dataclass(frozen=True)
class PlanColumns:
    """A rank's part of shared reads, by column: what is in elements, bytes or rows there (sharing.py) is so here."""

    num_dims: int  # the most that a region has; the rows of those with fewer are filled up
    bytes_sent: int
    bytes_received: int
    bytes_forwarded: int
    region_dims: np.ndarray
    region_offsets: np.ndarray  # [num_regions, num_dims]; filled up with 0
    region_sizes: np.ndarray  # [num_regions, num_dims]; filled up with 1
    copy_region: np.ndarray
    copy_offset: np.ndarray
    copy_strides: np.ndarray  # [num_copies, num_dims]; filled up with 0
    delivery_rank: np.ndarray
    delivery_copy: np.ndarray
    group_length: np.ndarray  # deliveries of each group
    group_delivery: np.ndarray  # those of one group after those of the one before
    own_tensor: np.ndarray
    own_chunk: np.ndarray
    own_shape: np.ndarray
    own_copy: np.ndarray
    shared_tensor: np.ndarray
    shared_chunk: np.ndarray
    shared_shape: np.ndarray
    shared_region: np.ndarray
    shared_group: np.ndarray
    shared_wanted: np.ndarray  # elements, by all ranks together
    shared_forwards: np.ndarray  # number of them
    forward_relay: np.ndarray
    forward_region: np.ndarray
    relayed_reader: np.ndarray
    relayed_tensor: np.ndarray
    relayed_chunk: np.ndarray
    relayed_region: np.ndarray
    relayed_group: np.ndarray

    @classmethod
    def of(cls, plan: SharedPlan) -> PlanColumns:
        """The columns of a plan."""
        tables = _Tables()
        lists = _lists_of(plan, tables)
        columns = {name: column for prefix, rows in lists.items() for name, column in _split(prefix, rows)}
        columns |= tables.columns()
        return cls(tables.num_dims, plan.bytes_sent, plan.bytes_received, plan.bytes_forwarded, **columns)

    @classmethod
    def from_flat(cls, header: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> PlanColumns:
        """From what `header` and `flat` gave. Raises LookupError, TypeError, ValueError for what is from no plan."""
        found: dict[str, Any] = {name: int(header[name]) for name in _NUMBERS} | {**columns}
        return cls(**found | {name: columns[name].reshape(-1, header["num_dims"]) for name in _WIDE})

    @property
    def header(self) -> dict[str, int]:
        """The numbers that are no columns."""
        return {name: getattr(self, name) for name in _NUMBERS}

    @property
    def flat(self) -> dict[str, np.ndarray]:
        """The columns, each in one dimension."""
        return {name: getattr(self, name).reshape(-1) for name in COLUMNS}

    def plan(self, tensors: Sequence[PlannedTensor]) -> SharedPlan:
        """What they are the columns of. They must have been checked (plan_check.py).

        Args:
            tensors: what the rank wants.
        """
        made = _Objects.of(self)
        return SharedPlan(
            made.own(self),
            made.shared(self),
            self.bytes_sent,
            self.bytes_received,
            self.bytes_forwarded,
            made.relayed(self, tensors),
        )


_NAMES = {field.name: field.type for field in fields(PlanColumns)}
_NUMBERS = [name for name, kind in _NAMES.items() if kind == "int"]
COLUMNS = {name: "<i8" if name in _LONG else "<i4" for name in _NAMES if name not in _NUMBERS}  # dtypes by name


def _lists_of(plan: SharedPlan, tables: _Tables) -> dict[str, list[tuple[int, ...]]]:
    """The four lists, row by row; what they name is added to the tables."""
    return {
        "own": [(r.tensor, r.chunk, tables.shape(r.chunk_shape), tables.copy(r)) for r in plan.own],
        "shared": [
            (
                *(r.tensor, r.chunk, tables.shape(r.chunk_shape), tables.region(r.region)),
                *(tables.group(r.deliveries), r.numel_wanted, len(r.forwards)),
            )
            for r in plan.shared
        ],
        "forward": [(f.relay, tables.region(f.box)) for r in plan.shared for f in r.forwards],
        "relayed": [
            (reader, r.tensor, r.chunk, tables.region(r.box), tables.group(r.deliveries))
            for reader, boxes in plan.relayed.items()
            for r in boxes
        ],
    }


def _split(prefix: str, rows: Sequence[tuple[int, ...]]) -> Iterator[tuple[str, np.ndarray]]:
    """The columns of one list."""
    names = [name for name in COLUMNS if name.startswith(f"{prefix}_")]
    table = np.array(rows, dtype=np.int64).reshape(len(rows), len(names))
    for place, name in enumerate(names):
        yield name, table[:, place].astype(COLUMNS[name])


class _Tables:
    """Numbers what occurs, each once. What is the same object is not compared: a plan has few objects, often."""

    def __init__(self) -> None:
        self._regions: dict[Region, int] = {}
        self._copies: dict[tuple[int, int, tuple[int, ...]], int] = {}
        self._deliveries: dict[tuple[int, int], int] = {}
        self._groups: dict[tuple[int, ...], int] = {}
        self._shapes: dict[tuple[int, ...], int] = {}
        # By ids: whoever gives the objects keeps them.
        self._known_copies: dict[tuple[int, int, int], int] = {}
        self._known_groups: dict[int, int] = {}

    @property
    def num_dims(self) -> int:
        return max((len(region.sizes) for region in self._regions), default=0) or 1

    def shape(self, shape: tuple[int, ...]) -> int:
        if shape not in self._shapes:
            self._shapes[shape] = self.region(Region.whole(shape))
        return self._shapes[shape]

    def region(self, region: Region) -> int:
        return self._regions.setdefault(region, len(self._regions))

    def copy(self, of: ReadItem | Delivery) -> int:
        alike = (id(of.source), of.offset, id(of.strides))
        if alike not in self._known_copies:
            copy = (self.region(of.source), of.offset, of.strides)
            self._known_copies[alike] = self._copies.setdefault(copy, len(self._copies))
        return self._known_copies[alike]

    def group(self, deliveries: tuple[Delivery, ...]) -> int:
        alike = id(deliveries)
        if alike not in self._known_groups:
            rows = [(d.world_rank, self.copy(d)) for d in deliveries]
            group = tuple(self._deliveries.setdefault(row, len(self._deliveries)) for row in rows)
            self._known_groups[alike] = self._groups.setdefault(group, len(self._groups))
        return self._known_groups[alike]

    def columns(self) -> Iterator[tuple[str, np.ndarray]]:
        """Those of the five tables."""
        regions, copies, groups = list(self._regions), list(self._copies), list(self._groups)
        found: dict[str, Any] = {
            "region_dims": [len(region.sizes) for region in regions],
            "region_offsets": self._filled([region.offsets for region in regions], 0),
            "region_sizes": self._filled([region.sizes for region in regions], 1),
            "copy_region": [region for region, _, _ in copies],
            "copy_offset": [offset for _, offset, _ in copies],
            "copy_strides": self._filled([strides for _, _, strides in copies], 0),
            "delivery_rank": [rank for rank, _ in self._deliveries],
            "delivery_copy": [copy for _, copy in self._deliveries],
            "group_length": [len(group) for group in groups],
            "group_delivery": [delivery for group in groups for delivery in group],
        }
        for name, column in found.items():
            yield name, np.array(column, dtype=COLUMNS[name])

    def _filled(self, rows: Sequence[tuple[int, ...]], value: int) -> np.ndarray:
        filled = [(*row, *(value,) * (self.num_dims - len(row))) for row in rows]
        return np.array(filled, dtype=np.int64).reshape(len(rows), self.num_dims)


@dataclass(frozen=True, slots=True)
class _Objects:
    """The rows of the tables as what they stand for."""

    regions: list[Region]
    copies: list[tuple[Region, int, tuple[int, ...]]]
    groups: list[tuple[Delivery, ...]]

    @classmethod
    def of(cls, columns: PlanColumns) -> _Objects:
        boxes = _lists(columns.region_dims, columns.region_offsets, columns.region_sizes)
        regions = [Region(tuple(offsets[:dims]), tuple(sizes[:dims])) for dims, offsets, sizes in boxes]
        places = _lists(columns.copy_region, columns.copy_offset, columns.copy_strides)
        copies = [(regions[row], at, tuple(strides[: len(regions[row].sizes)])) for row, at, strides in places]
        targets = _lists(columns.delivery_rank, columns.delivery_copy)
        deliveries = [Delivery(rank, *copies[copy]) for rank, copy in targets]
        members = iter(columns.group_delivery.tolist())
        groups = [tuple(deliveries[row] for row in islice(members, length)) for length in columns.group_length.tolist()]
        return cls(regions, copies, groups)

    def own(self, columns: PlanColumns) -> tuple[ReadItem, ...]:
        rows = _lists(columns.own_tensor, columns.own_chunk, columns.own_shape, columns.own_copy)
        return tuple(
            ReadItem(tensor, chunk, source, self.regions[shape].sizes, offset, strides)
            for tensor, chunk, shape, copy in rows
            for source, offset, strides in (self.copies[copy],)
        )

    def shared(self, columns: PlanColumns) -> tuple[SharedRead, ...]:
        regions, groups, forwards = self.regions, self.groups, self._forwards(columns)
        rows = _lists(
            *(columns.shared_tensor, columns.shared_chunk, columns.shared_shape, columns.shared_region),
            *(columns.shared_group, columns.shared_forwards, columns.shared_wanted),
        )
        return tuple(
            SharedRead(
                tensor,
                chunk,
                regions[shape].sizes,
                regions[region],
                groups[group],
                tuple(islice(forwards, num)),
                wanted,
            )
            for tensor, chunk, shape, region, group, num, wanted in rows
        )

    def _forwards(self, columns: PlanColumns) -> Iterator[Forward]:
        """Each has its place among those to the same relay, which is not written down."""
        counts: dict[int, int] = defaultdict(int)
        for relay, region in _lists(columns.forward_relay, columns.forward_region):
            yield Forward(relay, self.regions[region], counts[relay])
            counts[relay] += 1

    def relayed(self, columns: PlanColumns, tensors: Sequence[PlannedTensor]) -> dict[int, tuple[Relayed, ...]]:
        found: dict[int, list[Relayed]] = defaultdict(list)
        rows = _lists(
            *(columns.relayed_reader, columns.relayed_tensor, columns.relayed_chunk),
            *(columns.relayed_region, columns.relayed_group),
        )
        for reader, tensor, chunk, region, group in rows:
            itemsize = tensors[tensor].dtype.itemsize
            found[reader].append(Relayed(tensor, chunk, self.regions[region], itemsize, self.groups[group]))
        return {reader: tuple(boxes) for reader, boxes in found.items()}


def _lists(*columns: np.ndarray) -> Iterator[tuple[Any, ...]]:
    """Row by row, in Python's integers."""
    return zip(*(column.tolist() for column in columns), strict=True)
