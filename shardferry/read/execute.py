"""Execute read tasks: fetch each byte range and copy it to its destination, within the memory budget.

One way down: a task is fetched into a buffer (or straight into its destination), headers are parsed, and boxes are copied. What
an item needs beyond its opening request becomes further tasks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from shardferry.arena import Arena, Destination, HostArena, HostMemory, destination_of
from shardferry.checkpoint.catalog import Catalog, KnownValue
from shardferry.config import ReadLimits, ReadOptions
from shardferry.errors import DecodeError, StorageError
from shardferry.exchange.delivery import Delivery
from shardferry.plan.cooperative import CooperativePlan, CooperativeRead
from shardferry.plan.load_plan import LoadPlan
from shardferry.read.buffers import BufferPool, buffer_bytes
from shardferry.read.items import (
    ItemLayouts,
    StoredItem,
    TensorItem,
    decoded,
    items_of,
    object_item,
    read_layout,
    value_of,
)
from shardferry.read.requests import ContiguousRead, Request
from shardferry.read.schedule import (
    ItemRead,
    ObjectRead,
    OpenItems,
    ReadData,
    ReadTask,
    ReadWhole,
    RequestCache,
    data_reads,
    fetched_bytes,
    item_reads,
    object_reads,
    open_together,
    schedule,
)
from shardferry.read.threads import num_read_threads, run_tasks
from shardferry.read.zip_header import HeaderTooShort, ItemLayout
from shardferry.stats import Counters
from shardferry.storage.base import RangeReader
from shardferry.storage.retry import TransientStorageError

_MIN_DEVICE_THREADS = 2  # reads for a GPU's arena overlap the copies to it


@dataclass(frozen=True, slots=True)
class Cooperation:
    """A rank's part in cooperative reads, and the way to the other ranks."""

    plan: CooperativePlan
    delivery: Delivery


def read_plan(
    plan: LoadPlan,
    catalog: Catalog,
    storage: RangeReader,
    arena: Arena,
    options: ReadOptions,
    counters: Counters,
    cooperation: Cooperation | None = None,
    *,
    ranks_on_node: int = 1,
) -> None:
    """Fill the arena as planned.

    Args:
        cooperation: where ranks read for each other; the arena is filled when all of them are done.
        ranks_on_node: that share the node's cores.

    Raises:
        StorageError: a file is missing, short, or not the one that the catalog was made of.
        DecodeError: an item is damaged, or not the one that the metadata describes.
    """
    requests = RequestCache(storage.traits.read_limits(options))
    reads = item_reads(plan, catalog, None if cooperation is None else cooperation.plan)
    reserved_bytes = 0 if cooperation is None else cooperation.delivery.message_bytes
    buffers = BufferPool(options.memory_budget - reserved_bytes, timeout_s=options.load_s)
    delivery = None if cooperation is None else cooperation.delivery
    executor = Executor(
        storage,
        destination_of(arena, counters.busy),
        requests,
        buffers=buffers,
        counters=counters,
        delivery=delivery,
    )
    num_threads = num_read_threads(
        concurrency=options.concurrency, is_local=storage.traits.is_local, ranks_on_node=ranks_on_node
    )
    if not isinstance(arena, HostArena):
        num_threads = min(options.concurrency, max(num_threads, _MIN_DEVICE_THREADS))
    try:
        with _checked_files([read.item for read in reads], catalog, storage, options):
            run_tasks(executor.execute, schedule(reads, requests), num_threads=num_threads, timeout_s=options.load_s)
    finally:
        counters.update_peak(buffers.peak_bytes)


class Executor:
    """Executes the tasks of one rank. Safe to use from several threads."""

    def __init__(
        self,
        storage: RangeReader,
        destination: Destination,
        requests: RequestCache,
        buffers: BufferPool,
        counters: Counters,
        delivery: Delivery | None,
    ) -> None:
        self._storage = _CountedStorage(storage, counters)
        self._destination = destination
        self._requests = requests
        self._limits: ReadLimits = requests.limits
        self._buffers = buffers
        self._counters = counters
        self._delivery = delivery
        self._layouts = ItemLayouts()
        self._body_copies = 2 if storage.traits.holds_bodies else 1

    def execute(self, task: ReadTask) -> Sequence[ReadTask]:
        """Execute a task; returns what is left to read of its items. Raises StorageError, DecodeError."""
        claimed = self._bytes_held(task)
        if not claimed:
            return self._execute(task)
        with self._buffers.claim(claimed):
            return self._execute(task)

    def _execute(self, task: ReadTask) -> Sequence[ReadTask]:
        match task:
            case OpenItems():
                return self._open(task)
            case ReadData():
                self._read(task)
            case ReadWhole():
                self._read_whole(task.read)
        return ()

    def _open(self, task: OpenItems) -> Sequence[ReadTask]:
        if task.in_place is not None:
            return self._open_in_place(task.in_place)
        if task.mapped_bytes is not None:
            with self._storage.mapped(task.path, task.start, task.stop, looked_at=task.mapped_bytes) as window:
                return self._copy_opened(task.reads[0], window)
        if len(task.reads) == 1:
            (read,) = task.reads
            num_bytes = max(task.stop - task.start, min(self._layouts.header_bytes, read.item.byte_length))
            with self._buffers.buffer(num_bytes) as data:
                self._storage.read_into(task.path, task.start, data)
                return self._copy_opened(read, data)
        with self._buffers.buffer(task.stop - task.start) as data:
            self._storage.read_into(task.path, task.start, data)
            for read in task.reads:
                item = read.item
                content = data[item.byte_offset - task.start : item.byte_stop - task.start]
                self._copy_all(read, content, self._layouts.layout(item, content))
        self._counters.add_completed(sum(read.wanted_bytes for read in task.reads))
        return ()

    def _open_in_place(self, first: ReadData) -> Sequence[ReadTask]:
        """Fetch an item's header into a buffer and its first data into the arena; returns the reads of the rest.

        Where the header contradicts the expected layout, what was fetched is fetched again.
        """
        item, (request,) = first.read.item, first.requests
        with self._buffers.buffer(request.start) as header:
            with self._destination.writable(first.arena_offset + request.offset, request.wanted_bytes) as memory:
                self._storage.read_into(item.path, item.byte_offset, header, memory)
            layout = self._layout(item, header)
        found = data_reads(first.read, layout, self._requests)
        if (found[0].requests, found[0].arena_offset) != (first.requests, first.arena_offset):
            return found
        self._counters.add_completed(first.wanted_bytes)
        return found[1:]

    def _copy_opened(self, read: ItemRead, data: memoryview) -> Sequence[ReadTask]:
        """Copy what an item's first bytes hold; returns the reads of the rest."""
        layout, left = self._layout(read.item, data), []
        for one in data_reads(read, layout, self._requests):
            if one.stop > len(data):
                left.append(one)
            else:
                self._copy(one, data)
                self._counters.add_completed(one.wanted_bytes)
        return left

    def _layout(self, item: TensorItem, content: memoryview) -> ItemLayout:
        try:
            return self._layouts.layout(item, content)
        except HeaderTooShort:
            return read_layout(item, self._storage, self._layouts, known_bytes=len(content))

    def _read_whole(self, read: ItemRead) -> None:
        """An item that is transformed as a whole: decode it, then copy."""
        item = read.item
        with self._buffers.buffer(item.byte_length) as data:
            self._storage.read_into(item.path, item.byte_offset, data)
            content = memoryview(decoded(item, data))
            layout = self._layouts.layout(item, content, num_bytes=len(content))
            self._copy_all(read, content, layout)
        self._counters.add_completed(read.wanted_bytes)

    def _copy_all(self, read: ItemRead, content: memoryview, layout: ItemLayout) -> None:
        """Copy everything that is wanted of an item out of its bytes."""
        for arena_offset, copy in read.copies:
            for request in self._requests.of_copy(layout, copy):
                request.copy_from(content, self._destination, arena_offset)
        for part in read.parts:
            self._copy_part(read, part, self._requests.of_part(layout, part), content)

    def _copy(self, one: ReadData, content: memoryview) -> None:
        if one.part is not None:
            self._copy_part(one.read, one.part, one.requests, content)
            return
        for request in one.requests:
            request.copy_from(content, self._destination, one.arena_offset)

    def _copy_part(
        self, read: ItemRead, part: CooperativeRead, requests: Sequence[Request], content: memoryview
    ) -> None:
        """Deliver a part out of its item's bytes: from its place there, where it is contiguous."""
        assert self._delivery is not None
        start = _contiguous_start(requests)
        if start is not None:
            self._delivery.give(part, content[start : start + read.part_bytes(part)])
            return
        with self._buffers.buffer(read.part_bytes(part)) as packed:
            for request in requests:
                request.copy_from(content, HostMemory(packed), 0)
            self._delivery.give(part, packed)

    def _read(self, one: ReadData) -> None:
        """Fetch the data of an item whose layout is known."""
        if one.part is None:
            for request in one.requests:
                self._fetch(one.read.item, request, self._destination, one.arena_offset)
        else:
            self._read_part(one.read, one.part, one.requests)
        self._counters.add_completed(one.wanted_bytes)

    def _read_part(self, read: ItemRead, part: CooperativeRead, requests: Sequence[Request]) -> None:
        assert self._delivery is not None
        own = self._delivery.own_memory(part)
        if own is not None:  # this rank wants the part as it is: it is read in place, then given to the others
            for request in requests:
                self._fetch(read.item, request, HostMemory(own), 0)
            self._delivery.give(part, own, to_itself=False)
            return
        with self._buffers.buffer(read.part_bytes(part)) as packed:
            for request in requests:
                self._fetch(read.item, request, HostMemory(packed), 0)
            self._delivery.give(part, packed)

    def _fetch(self, item: StoredItem, request: Request, destination: Destination, byte_offset: int) -> None:
        start, stop = item.byte_offset + request.start, item.byte_offset + request.stop
        if isinstance(request, ContiguousRead):
            with destination.writable(byte_offset + request.offset, request.wanted_bytes) as memory:
                self._storage.read_into(item.path, start, memory)
            return
        if self._limits.maps_files:
            with self._storage.mapped(item.path, start, stop, looked_at=fetched_bytes(request, self._limits)) as window:
                request.copy_from_window(window, destination, byte_offset)
            return
        with self._buffers.buffer(stop - start) as window:
            self._storage.read_into(item.path, start, window)
            request.copy_from_window(window, destination, byte_offset)

    def _bytes_held(self, task: ReadTask) -> int:
        """Bytes that a task holds at most beside the arena."""
        match task:
            case OpenItems():
                nbytes = task.stop - task.start
                if task.in_place is not None:
                    return buffer_bytes(task.in_place.start) + (self._body_copies - 1) * nbytes
                largest_part = max((read.part_bytes(part) for read in task.reads for part in read.parts), default=0)
                return largest_part + (0 if task.mapped_bytes is not None else self._body_copies * buffer_bytes(nbytes))
            case ReadWhole():  # as it is stored, and decoded
                decoded_bytes = 2 * task.read.item.byte_length + task.read.bytes_to_read
                return decoded_bytes + (self._body_copies - 1) * task.read.item.byte_length
            case ReadData():
                windows = max(map(self._request_bytes_held, task.requests))
                part = 0 if task.part is None else buffer_bytes(task.read.part_bytes(task.part))
                return windows + part

    def _request_bytes_held(self, request: Request) -> int:
        nbytes = request.stop - request.start
        if isinstance(request, ContiguousRead):
            return (self._body_copies - 1) * nbytes
        return 0 if self._limits.maps_files else buffer_bytes(nbytes) + (self._body_copies - 1) * nbytes


def _contiguous_start(requests: Sequence[Request]) -> int | None:
    """Where a part starts in its item, if its packed bytes are contiguous there."""
    start = requests[0].start
    for request in requests:
        if not isinstance(request, ContiguousRead) or request.start - start != request.offset:
            return None
    return start


class _CountedStorage:
    """A storage that counts and clocks its requests."""

    def __init__(self, storage: RangeReader, counters: Counters) -> None:
        self._storage = storage
        self._counters = counters

    def read_into(self, path: str, byte_offset: int, *buffers: memoryview) -> None:
        self._counters.add_requests(num_requests=1, nbytes=sum(map(len, buffers)))
        with self._counters.busy.at("storage"):
            self._storage.read_into(path, byte_offset, *buffers)

    @contextmanager
    def mapped(self, path: str, start: int, stop: int, *, looked_at: int) -> Iterator[memoryview]:
        self._counters.add_requests(num_requests=1, nbytes=looked_at)
        with self._counters.busy.at("storage"):  # pages are read where they are looked at
            yield self._storage.mapped(path, start, stop)


def read_objects(
    keys: Sequence[str], catalog: Catalog, storage: RangeReader, options: ReadOptions, counters: Counters
) -> dict[str, Any]:
    """Saved Python objects by key. Neighbours in a file are read in one request.

    Raises:
        StorageError: a file is missing, short, or not the one that the catalog was made of.
        DecodeError: an item is damaged.
    """
    items = {key: object_item(catalog, key) for key in keys}
    values = {key: value_of(item, b"") for key, item in items.items() if isinstance(item.format, KnownValue)}
    reads = object_reads(catalog, keys)
    source = _CountedStorage(storage, counters)
    buffers = BufferPool(options.memory_budget, timeout_s=options.load_s)

    def read_group(group: Sequence[ObjectRead]) -> tuple[()]:
        start, stop = group[0].item.byte_offset, group[-1].item.byte_stop
        with buffers.claim(2 * buffer_bytes(stop - start)), buffers.buffer(stop - start) as data:
            source.read_into(group[0].item.path, start, data)
            for read in group:
                item = read.item
                values[item.key] = value_of(item, data[item.byte_offset - start : item.byte_stop - start])
        counters.add_completed(sum(read.item.byte_length for read in group))
        return ()

    groups = open_together(reads, storage.traits.read_limits(options))
    num_threads = num_read_threads(concurrency=options.concurrency, is_local=storage.traits.is_local, ranks_on_node=1)
    with _checked_files([read.item for read in reads], catalog, storage, options):
        run_tasks(read_group, groups, num_threads=num_threads, timeout_s=options.load_s)
    return {key: values[key] for key in keys}


def check_files(catalog: Catalog, keys: Iterable[str], storage: RangeReader) -> None:
    """Check, before anything is started or read, that every file with data of ``keys`` is there and has its size.

    Raises:
        StorageError: names the key, the file, and both sizes.
    """
    _check_sizes([item for key in keys for item in items_of(catalog, key)], catalog, storage, ReadOptions())


@contextmanager
def _checked_files(
    items: Sequence[StoredItem], catalog: Catalog, storage: RangeReader, options: ReadOptions
) -> Iterator[None]:
    """Check the files' sizes: before they are read, or with the answers where each tells its file's size.

    Raises:
        StorageError: see `check_files`; where a read fails, the size says more than a range that is not there.
    """
    if not storage.traits.tells_sizes:
        _check_sizes(items, catalog, storage, options)
        yield
        return
    try:
        yield
    except (StorageError, DecodeError) as error:
        if not isinstance(error.__cause__, TransientStorageError):  # a storage that doesn't answer is not asked again
            _check_sizes(items, catalog, storage, options)
        raise
    _check_sizes(items, catalog, storage, options)


def _check_sizes(items: Iterable[StoredItem], catalog: Catalog, storage: RangeReader, options: ReadOptions) -> None:
    """Check each file against its last item."""
    last: dict[str, StoredItem] = {}
    for item in items:
        if item.path not in last or item.byte_stop > last[item.path].byte_stop:
            last[item.path] = item

    def check(item: StoredItem) -> tuple[()]:
        _check_size(item, catalog, storage)
        return ()

    num_threads = 1 if storage.traits.is_local else options.concurrency
    run_tasks(check, last.values(), num_threads=num_threads, timeout_s=options.load_s)


def _check_size(item: StoredItem, catalog: Catalog, storage: RangeReader) -> None:
    try:
        size = storage.size(item.path)
    except StorageError as error:
        raise StorageError(f"{item.key}: {error}") from error
    if item.byte_stop > size:
        raise StorageError(
            f"{item.key}: its item is bytes {item.byte_offset} to {item.byte_stop} of {storage.location}/{item.path}, "
            f"which has {size} bytes; the file is cut, or the metadata is not of this checkpoint"
        )
    before = catalog.file_bytes.get(item.path, size)
    if size != before:
        raise StorageError(
            f"{item.key}: {storage.location}/{item.path} has {size} bytes, it had {before} when the catalog was read: it was "
            "written again since. Open the checkpoint again."
        )
