"""Execute read tasks: fetch each byte range and copy it to its destination, within the memory budget.

A task is fetched into a buffer (or straight into its destination), headers are parsed, and boxes are copied. What an item needs
beyond its opening request becomes further tasks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from shardferry.arena import Arena, Destination, HostArena, HostMemory, destination_of
from shardferry.checkpoint.catalog import Catalog, KnownValue
from shardferry.config import ReadLimits, ReadOptions
from shardferry.errors import DecodeError, MissingFile, StorageError
from shardferry.exchange.delivery import Delivery
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
from shardferry.read.objects import ForeignClass, allowed_classes
from shardferry.read.requests import ContiguousRead, Request
from shardferry.read.schedule import (
    ObjectRead,
    OpenItems,
    ReadData,
    ReadTask,
    RequestCache,
    class_reads,
    data_reads,
    fetched_bytes,
    item_reads,
    object_reads,
    open_together,
    schedule,
)
from shardferry.read.threads import num_read_threads, run_tasks
from shardferry.read.zip_header import HeaderTooShort, ItemLayout, QuantisedState
from shardferry.stats import Counters
from shardferry.storage.base import RangeReader
from shardferry.storage.retry import TransientStorageError

_Put = Callable[[Request, Destination, int], None]  # a request, and bytes in the destination
_MIN_DEVICE_THREADS = 2  # reads for a GPU's arena overlap the copies to it


def read_plan(
    plan: LoadPlan,
    catalog: Catalog,
    storage: RangeReader,
    arena: Arena,
    options: ReadOptions,
    counters: Counters,
    delivery: Delivery | None = None,
    *,
    ranks_on_node: int = 1,
) -> None:
    """Fill the arena as planned.

    Args:
        delivery: where ranks read for each other; the arena is filled when all of them are done.
        ranks_on_node: that share the node's cores.

    Raises:
        StorageError: a file is missing, short, or not the one that the catalog was made of.
        DecodeError: an item is damaged, or not the one that the metadata describes.
    """
    requests = RequestCache(storage.traits.read_limits(options))
    reads = item_reads(plan, catalog, None if delivery is None else delivery.cooperative)
    reserved_bytes = 0 if delivery is None else delivery.message_bytes
    buffers = BufferPool(options.memory_budget - reserved_bytes, timeout_s=options.load_s)
    destination = destination_of(arena, counters.busy)
    executor = Executor(storage, destination, requests, buffers=buffers, counters=counters, delivery=delivery)
    num_threads = num_read_threads(
        concurrency=options.concurrency, is_local=storage.traits.is_local, ranks_on_node=ranks_on_node
    )
    if not isinstance(arena, HostArena):
        num_threads = min(options.concurrency, max(num_threads, _MIN_DEVICE_THREADS))
    try:
        with _checked_files([read.item for read in reads], catalog, storage, options):
            run_tasks(executor.execute, schedule(reads, requests), num_threads=num_threads, timeout_s=options.load_s)
    finally:
        destination.finish()
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
        with self._buffers.claim(claimed) if claimed else nullcontext():
            if isinstance(task, OpenItems):
                return self._open(task) if task.first is None else self._open_with_first(task, task.first)
            self._carry_out(task, partial(self._fetch, task.read.item))
            return ()

    def _open(self, task: OpenItems) -> Sequence[ReadTask]:
        left: list[ReadData] = []
        num_bytes = task.stop - task.start
        if len(task.reads) == 1:
            num_bytes = max(num_bytes, min(self._layouts.header_bytes, task.reads[0].item.byte_length))
        with self._buffers.buffer(num_bytes) as data:
            self._storage.read_into(task.path, task.start, data)
            for read in task.reads:
                item = read.item
                content = memoryview(decoded(item, data[item.byte_offset - task.start : item.byte_stop - task.start]))
                for one in data_reads(read, self._layout(item, content), self._requests):
                    if one.stop > len(content):
                        left.append(one)
                    else:
                        self._carry_out(one, partial(_copy, content), content)
        return left

    def _open_with_first(self, task: OpenItems, first: ReadData) -> Sequence[ReadTask]:
        """Fetch an item's header and its first data; returns the reads of the rest, or all where the header contradicts."""
        item, (request,) = first.read.item, first.requests
        if isinstance(request, ContiguousRead):
            with self._buffers.buffer(request.start) as header:
                with self._destination.writable(first.arena_offset + request.offset, request.wanted_bytes) as memory:
                    self._storage.read_into(item.path, item.byte_offset, header, memory)
                found = data_reads(first.read, self._layout(item, header), self._requests)
            if found[0] != first:
                return found
            self._counters.add_completed(first.wanted_bytes)
            return found[1:]
        with self._storage.mapped(task.path, task.start, task.stop, looked_at=task.nbytes) as window:
            found = data_reads(first.read, self._layout(item, window), self._requests)
            if found[0] != first:
                return found
            self._carry_out(first, partial(_copy, window))
            return found[1:]

    def _layout(self, item: TensorItem, content: memoryview) -> ItemLayout:
        try:
            return self._layouts.layout(item, content)
        except HeaderTooShort:
            return read_layout(item, self._storage, self._layouts, known_bytes=len(content))

    def _carry_out(self, one: ReadData, put: _Put, content: memoryview | None = None) -> None:
        """Bring data of an item whose layout is known to its destination, or as a part to all ranks that want it.

        Args:
            put: carries out one request.
            content: of the item, from its start, where it is in memory: a part that is contiguous there is not copied.
        """
        if one.part is None:
            for request in one.requests:
                put(request, self._destination, one.arena_offset)
        else:
            assert self._delivery is not None
            start = None if content is None else _contiguous_start(one.requests)
            nbytes = one.read.part_bytes(one.part)
            if content is not None and start is not None:
                self._delivery.give(one.part, content[start : start + nbytes])
            else:
                own = self._delivery.own_memory(one.part)  # in place where this rank wants the part as it is
                with self._buffers.buffer(nbytes) if own is None else nullcontext(own) as packed:
                    for request in one.requests:
                        put(request, HostMemory(packed), 0)
                    self._delivery.give(one.part, packed, to_itself=own is None)
        self._counters.add_completed(one.wanted_bytes)

    def _fetch(self, item: StoredItem, request: Request, destination: Destination, byte_offset: int) -> None:
        start, stop = item.byte_offset + request.start, item.byte_offset + request.stop
        if isinstance(request, ContiguousRead):
            with destination.writable(byte_offset + request.offset, request.wanted_bytes) as memory:
                self._storage.read_into(item.path, start, memory)
            return
        if self._limits.maps_files:
            with self._storage.mapped(item.path, start, stop, looked_at=fetched_bytes(request, self._limits)) as window:
                request.copy_from(window, destination, byte_offset)
            return
        with self._buffers.buffer(stop - start) as window:
            self._storage.read_into(item.path, start, window)
            request.copy_from(window, destination, byte_offset)

    def _bytes_held(self, task: ReadTask) -> int:
        """Bytes that a task holds at most beside the arena."""
        if isinstance(task, ReadData):
            part = 0 if task.part is None else buffer_bytes(task.read.part_bytes(task.part))
            return part + max(map(self._request_bytes_held, task.requests))
        nbytes, read = task.stop - task.start, task.reads[0]
        largest_part = max((read.part_bytes(part) for read in task.reads for part in read.parts), default=0)
        if task.first is not None:  # a buffer for the header, or one for a part
            return max(buffer_bytes(task.first.start), largest_part) + (self._body_copies - 1) * nbytes
        if not read.item.is_ranged:  # as it is stored, and decoded
            return (1 + self._body_copies) * nbytes + read.bytes_to_read
        return largest_part + self._body_copies * buffer_bytes(nbytes)

    def _request_bytes_held(self, request: Request) -> int:
        nbytes = request.stop - request.start
        if isinstance(request, ContiguousRead):
            return (self._body_copies - 1) * nbytes
        return 0 if self._limits.maps_files else buffer_bytes(nbytes) + (self._body_copies - 1) * nbytes


def _copy(content: memoryview, request: Request, destination: Destination, byte_offset: int) -> None:
    request.copy_from(content[request.start : request.stop], destination, byte_offset)


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
        with self._counters.request(path, sum(map(len, buffers))):
            self._storage.read_into(path, byte_offset, *buffers)

    @contextmanager
    def mapped(self, path: str, start: int, stop: int, *, looked_at: int) -> Iterator[memoryview]:
        with self._counters.request(path, looked_at):  # pages are read where they are looked at
            yield self._storage.mapped(path, start, stop)


def _raised(key: str, data: bytes, error: DecodeError) -> Any:
    raise error


def read_objects(
    keys: Sequence[str],
    catalog: Catalog,
    storage: RangeReader,
    options: ReadOptions,
    counters: Counters,
    unread: Callable[[str, bytes, DecodeError], Any] = _raised,
) -> dict[str, Any]:
    """Saved Python objects by key. Neighbours in a file are read in one request.

    Args:
        unread: called for an object that can't be decoded, with its key and its bytes; gives a value, or raises.

    Raises:
        StorageError: a file is missing, short, or not the one that the catalog was made of.
        DecodeError: an item is damaged.
    """
    items = {key: object_item(catalog, key) for key in keys}
    values = {key: value_of(item, b"") for key, item in items.items() if isinstance(item.format, KnownValue)}

    def take(item: StoredItem, stored: memoryview) -> None:
        try:
            values[item.key] = value_of(item, stored)
        except DecodeError as error:
            values[item.key] = unread(item.key, bytes(stored), error)

    read_items(object_reads(catalog, keys), take, catalog, storage, options=options, counters=counters)
    return {key: values[key] for key in keys}


def read_items(
    reads: Sequence[ObjectRead],
    take: Callable[[StoredItem, memoryview], None],
    catalog: Catalog,
    storage: RangeReader,
    options: ReadOptions,
    counters: Counters,
) -> None:
    """Read whole items. Neighbours in a file are read in one request.

    Args:
        reads: in reading order.
        take: gets each item and its bytes as they are stored, which don't stay; is called from several threads.

    Raises:
        StorageError: a file is missing, short, or not the one that the catalog was made of. What ``take`` raises.
    """
    source = _CountedStorage(storage, counters)
    buffers = BufferPool(options.memory_budget, timeout_s=options.load_s)

    def read_group(group: Sequence[ObjectRead]) -> tuple[()]:
        start, stop = group[0].item.byte_offset, group[-1].item.byte_stop
        with buffers.claim(2 * buffer_bytes(stop - start)), buffers.buffer(stop - start) as data:
            source.read_into(group[0].item.path, start, data)
            for read in group:
                take(read.item, data[read.item.byte_offset - start : read.item.byte_stop - start])
        counters.add_completed(sum(read.item.byte_length for read in group))
        return ()

    groups = open_together(reads, storage.traits.read_limits(options))
    num_threads = num_read_threads(concurrency=options.concurrency, is_local=storage.traits.is_local, ranks_on_node=1)
    with _checked_files([read.item for read in reads], catalog, storage, options):
        run_tasks(read_group, groups, num_threads=num_threads, timeout_s=options.load_s)


def read_classes(
    plan: LoadPlan, catalog: Catalog, storage: RangeReader, options: ReadOptions, counters: Counters
) -> dict[int, torch.Tensor]:
    """The tensors of a plan that only their classes can make, by row; nothing is read where there are none.

    Raises:
        QuantisedState: a class is not allowed. StorageError, DecodeError: an item can't be read.
        SpecError: a class that the request allows can't be imported.
    """
    rows: dict[tuple[str, int], list[int]] = defaultdict(list)  # by the item's place
    reads = class_reads(plan, catalog)
    for row, read in reads:
        rows[read.item.path, read.item.byte_offset].append(row)
    found: dict[int, torch.Tensor] = {}

    def take(item: StoredItem, stored: memoryview) -> None:
        for row in rows[item.path, item.byte_offset]:
            found[row] = _tensor_of(plan, row, item, stored)

    if reads:
        with torch.serialization.safe_globals(allowed_classes(plan.request.safe_globals)):
            unique = list({read.item: read for _, read in reads}.values())
            read_items(unique, take, catalog, storage, options=options, counters=counters)
    return found


def _tensor_of(plan: LoadPlan, row: int, item: StoredItem, stored: memoryview) -> torch.Tensor:
    planned = plan.tensors[row]
    try:
        tensor = value_of(item, stored)
    except ForeignClass as error:
        raise QuantisedState(
            f"{planned.fqn}: quantised state: {planned.name!r} ({item.key}, item at byte {item.byte_offset} of {item.path}) was saved as "
            f"a tensor of {', '.join(error.names)}, which was not imported. If you trust it, allow it with "
            "torch.serialization.add_safe_globals or checkpoint.safe_globals; else leave the parameter out with exclude, or save it "
            "dequantised, as a plain tensor"
        ) from error
    if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != planned.layout.local_shape:
        what = f"a tensor of shape {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise item.damaged(f"it holds {what}, the metadata says one of shape {planned.layout.local_shape}")
    return tensor


def check_files(
    catalog: Catalog, keys: Iterable[str], storage: RangeReader, *, elsewhere: Collection[str] = ()
) -> None:
    """Check, before anything is started or read, that every file with data of ``keys`` is there and has its size.

    Args:
        elsewhere: files that other nodes may have, which are not checked.

    Raises:
        StorageError: names the key, the file, and both sizes.
    """
    items = (item for key in keys for item in items_of(catalog, key) if item.path not in elsewhere)
    _check_sizes(items, catalog, storage, ReadOptions())


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

    num_threads = 1 if storage.traits.is_local else options.concurrency
    check = partial(_check_size, catalog, storage)
    run_tasks(check, last.values(), num_threads=num_threads, timeout_s=options.load_s)


def _check_size(catalog: Catalog, storage: RangeReader, item: StoredItem) -> tuple[()]:
    try:
        size = storage.size(item.path)
    except MissingFile as error:
        raise MissingFile(f"{item.key}: {error}") from error
    except StorageError as error:
        raise StorageError(f"{item.key}: {error}") from error
    if item.byte_stop > size:
        raise StorageError(
            f"{item.key}: its item is bytes {item.byte_offset} to {item.byte_stop} of {storage.where(item.path)}, "
            f"which has {size} bytes; the file is cut, or the metadata is not of this checkpoint"
        )
    before = catalog.file_bytes.get(item.path, size)
    if size != before:
        raise StorageError(
            f"{item.key}: {storage.where(item.path)} has {size} bytes, it had {before} when the catalog was read: it was "
            "written again since. Open the checkpoint again."
        )
    return ()
