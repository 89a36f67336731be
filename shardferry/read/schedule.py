"""Turn a load plan into read tasks: which byte ranges are fetched together, and what is copied out of them. Pure.

An item starts with a header that says where its data is (zip_header.py). The task that opens an item fetches its header together
with the first data, if both are one request; the other data of the item follows once the header is parsed::

    item      |header|raw bytes ...                              |tail|
    opened    [------------]     one request: header and first data
    then                   [-----------][-----------]

Where the first data is expected follows from the item's length. Small items that are neighbours in a file are opened by one
request, whole. The dry run counts the same tasks with the layouts that items are expected to have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from shardferry.checkpoint.catalog import Catalog, KnownValue, RawItem
from shardferry.config import ReadLimits
from shardferry.plan.cooperative import CooperativePlan, CooperativeRead
from shardferry.plan.load_plan import LoadPlan, ReadItem
from shardferry.read.coalesce import WantedRange, coalesce, header_is_one_request
from shardferry.read.items import StoredItem, TensorItem, assumed_layout, expected_layout, object_item, tensor_item
from shardferry.read.requests import ContiguousRead, Request, StridedRead, requests_for
from shardferry.read.zip_header import HEADER_BYTES, ItemLayout
from shardferry.region import BoxCopy, Region, row_major_strides

AnyRead = TypeVar("AnyRead", bound="ItemRead | ObjectRead")


@dataclass(slots=True, eq=False)
class ItemRead:
    """What one rank reads of a saved tensor item."""

    item: TensorItem
    copies: list[tuple[int, BoxCopy]] = field(default_factory=list)  # bytes, where the copy starts in the arena
    parts: list[CooperativeRead] = field(default_factory=list)  # that it reads for several ranks

    @property
    def bytes_to_read(self) -> int:
        """Without the header."""
        own = sum(copy.source.numel for _, copy in self.copies) * self.item.dtype.itemsize
        return own + sum(map(self.part_bytes, self.parts))

    def part_bytes(self, part: CooperativeRead) -> int:
        """Bytes of a part, packed."""
        return part.region.numel * self.item.dtype.itemsize


@dataclass(slots=True, eq=False)
class ObjectRead:
    """A saved Python object, which is read whole."""

    item: StoredItem

    @property
    def bytes_to_read(self) -> int:
        return self.item.byte_length


@dataclass(frozen=True, slots=True)
class OpenItems:
    """Task: one request for whole items, or for one item's header and first data. Whole: several items, or one not ranged."""

    path: str
    start: int  # bytes, in the file
    stop: int  # bytes, exclusive
    reads: tuple[ItemRead, ...]
    first: ReadData | None = None  # the expected first data, where it goes straight into the arena or out of a mapping

    @property
    def nbytes(self) -> int:
        """Bytes that the request takes from storage."""
        if self.first is None or isinstance(self.first.requests[0], ContiguousRead):
            return self.stop - self.start
        return assumed_layout(self.first.read.item).raw_start + self.first.requests[0].wanted_bytes


@dataclass(frozen=True, slots=True)
class ReadData:
    """Task: requests for data of one item whose layout is known."""

    read: ItemRead
    requests: Sequence[Request]
    arena_offset: int  # bytes, where the copy starts in the arena; 0 for a part
    part: CooperativeRead | None = None  # that the requests fill, instead of the arena

    @property
    def start(self) -> int:
        """First byte, in the item."""
        return self.requests[0].start

    @property
    def stop(self) -> int:
        """Bytes, in the item, exclusive."""
        return max(request.stop for request in self.requests)

    @property
    def wanted_bytes(self) -> int:
        """By all ranks together."""
        if self.part is not None:
            return self.part.numel_wanted * self.read.item.dtype.itemsize
        return sum(request.wanted_bytes for request in self.requests)


ReadTask = OpenItems | ReadData


class RequestCache:
    """The requests of copies, worked out once for equal layouts and the same copy or part."""

    def __init__(self, limits: ReadLimits) -> None:
        self.limits = limits
        self._known: dict[tuple[ItemLayout, int | Region], tuple[BoxCopy, Sequence[Request]]] = {}

    def of_copy(self, layout: ItemLayout, copy: BoxCopy) -> Sequence[Request]:
        """See `requests_for`. Plans keep equal copies as one object."""
        same = layout, id(copy)  # the entry keeps the copy alive
        known = self._known.get(same)
        if known is None:
            known = self._known[same] = copy, requests_for(layout, copy, self.limits)
        return known[1]

    def of_part(self, layout: ItemLayout, part: CooperativeRead) -> Sequence[Request]:
        """The requests that fill a part, packed row-major."""
        same = layout, part.region
        known = self._known.get(same)
        if known is None:
            copy = BoxCopy(part.region, 0, row_major_strides(part.region.sizes))
            known = self._known[same] = copy, requests_for(layout, copy, self.limits)
        return known[1]


def data_reads(read: ItemRead, layout: ItemLayout, requests: RequestCache) -> list[ReadData]:
    """Everything that is read of an item with this layout, in the order of the item's bytes."""
    found = [
        ReadData(read, (request,), arena_offset)
        for arena_offset, copy in read.copies
        for request in requests.of_copy(layout, copy)
    ]
    found += [ReadData(read, needed, 0, part) for part in read.parts if (needed := requests.of_part(layout, part))]
    found.sort(key=lambda one: one.start)
    return found


def item_reads(plan: LoadPlan, catalog: Catalog, cooperative: CooperativePlan | None) -> list[ItemRead]:
    """What a rank reads, item by item, in the order of files and positions.

    Each rank starts at another file, so that ranks don't queue for the same one.

    Args:
        cooperative: the rank's part where ranks read for each other; None where it reads its own plan.
    """
    reads: dict[int, ItemRead] = {}

    def read_of(one: ReadItem | CooperativeRead) -> ItemRead:
        found = reads.get(one.chunk)
        if found is None:
            tensor = plan.tensors[one.tensor]
            item = tensor_item(catalog, key=tensor.key, dtype=tensor.dtype, shape=one.chunk_shape, chunk=one.chunk)
            found = reads[one.chunk] = ItemRead(item)
        return found

    for own in plan.reads if cooperative is None else cooperative.own:
        tensor = plan.tensors[own.tensor]
        read_of(own).copies.append((tensor.arena_offset + own.copy.offset * tensor.dtype.itemsize, own.copy))
    for part in () if cooperative is None else cooperative.reads:
        read_of(part).parts.append(part)
    by_file: dict[str, list[ItemRead]] = {}
    for read in reads.values():
        by_file.setdefault(read.item.path, []).append(read)
    paths = sorted(by_file)
    first = plan.world_rank * len(paths) // max(plan.world_size, 1)
    return [
        read
        for path in (*paths[first:], *paths[:first])
        for read in sorted(by_file[path], key=lambda read: read.item.byte_offset)
    ]


def schedule(reads: Sequence[ItemRead], requests: RequestCache) -> list[ReadTask]:
    """The first tasks of a rank: every item is opened once.

    Args:
        reads: in reading order, see `item_reads`.
    """
    tasks: list[ReadTask] = []
    for group in open_together(reads, requests.limits):
        item = group[0].item
        if len(group) > 1 or not item.is_ranged:
            tasks.append(OpenItems(item.path, item.byte_offset, group[-1].item.byte_stop, tuple(group)))
        elif isinstance(item.format, RawItem):
            tasks += data_reads(group[0], assumed_layout(item), requests)
        else:
            tasks.append(_opening(group[0], requests))
    return tasks


def open_together(reads: Sequence[AnyRead], limits: ReadLimits) -> Iterator[Sequence[AnyRead]]:
    """Group the items that are opened by one request. A group of several is fetched whole.

    Args:
        reads: of each file in one run, ascending.
    """
    ranges = [
        WantedRange(
            read.item.byte_offset,
            read.item.byte_stop,
            read.bytes_to_read,
            path=read.item.path,
            is_ranged=read.item.is_ranged,
        )
        for read in reads
    ]
    for members in coalesce(ranges, limits):
        yield reads[members]


def _opening(read: ItemRead, requests: RequestCache) -> OpenItems:
    """The task that opens an item by itself: its header, with the first data where both are one request."""
    item, limits = read.item, requests.limits
    num_bytes, first = HEADER_BYTES, None
    layout = expected_layout(item)
    expected = [] if layout is None else data_reads(read, layout, requests)
    if layout is not None and expected and len(expected[0].requests) == 1:
        (request,) = expected[0].requests
        if header_is_one_request(layout.raw_start, request.start, request.stop, request.wanted_bytes, limits):
            num_bytes = request.stop
            is_in_place = isinstance(request, ContiguousRead) and expected[0].part is None
            is_mapped = isinstance(request, StridedRead) and limits.maps_files
            first = expected[0] if is_in_place or is_mapped else None
    return OpenItems(item.path, item.byte_offset, item.byte_offset + min(num_bytes, item.byte_length), (read,), first)


def object_reads(catalog: Catalog, keys: Iterable[str]) -> list[ObjectRead]:
    """The reads of saved Python objects that have to be read, in reading order."""
    items = [object_item(catalog, key) for key in keys]
    stored = [item for item in items if not isinstance(item.format, KnownValue)]
    return [ObjectRead(item) for item in sorted(stored, key=lambda item: (item.path, item.byte_offset))]


def class_reads(plan: LoadPlan, catalog: Catalog) -> list[tuple[int, ObjectRead]]:
    """The reads of the plan's tensors of classes of their own, by row of `LoadPlan.tensors`, in reading order."""
    rows = [(row, t, t.chunk) for row, t in enumerate(plan.tensors) if t.chunk is not None]
    reads = [
        (row, ObjectRead(tensor_item(catalog, key=t.key, dtype=t.dtype, shape=t.layout.local_shape, chunk=chunk)))
        for row, t, chunk in rows
    ]
    return sorted(reads, key=lambda read: (read[1].item.path, read[1].item.byte_offset))


def requests_of_plan(
    plan: LoadPlan, catalog: Catalog, limits: ReadLimits, cooperative: CooperativePlan | None = None
) -> tuple[int, int]:
    """Bytes and number of the requests that one rank will make for its tensors: a dry run of the schedule.

    Strides are known only from headers; chunks are taken to be row-major, and items to have their expected layouts.
    """
    requests = RequestCache(limits)
    opened: list[OpenItems] = []
    data: list[ReadData] = []
    for task in schedule(item_reads(plan, catalog, cooperative), requests):
        if isinstance(task, ReadData):
            data.append(task)
            continue
        opened.append(task)
        item = task.reads[0].item
        if len(task.reads) == 1 and item.is_ranged:
            found = data_reads(task.reads[0], assumed_layout(item), requests)
            data += found[1:] if task.first else [one for one in found if one.stop > task.stop - task.start]
    fetched = [fetched_bytes(request, limits) for one in data for request in one.requests]
    wholes = open_together([read for _, read in class_reads(plan, catalog)], limits)
    fetched += [group[-1].item.byte_stop - group[0].item.byte_offset for group in wholes]
    return sum(task.nbytes for task in opened) + sum(fetched), len(opened) + len(fetched)


def fetched_bytes(request: Request, limits: ReadLimits) -> int:
    """Bytes that a request takes from storage."""
    return request.wanted_bytes if limits.maps_files else request.stop - request.start


def count_objects(catalog: Catalog, keys: Iterable[str], limits: ReadLimits) -> tuple[int, int]:
    """Bytes and number of the requests that read some saved Python objects, and small tensors whole."""
    unique = dict.fromkeys(keys)
    tensors = [catalog.tensors[key].nbytes for key in unique if key in catalog.tensors]
    groups = open_together(object_reads(catalog, [key for key in unique if key in catalog.objects]), limits)
    lengths = [group[-1].item.byte_stop - group[0].item.byte_offset for group in groups] + tensors
    return sum(lengths), len(lengths)
