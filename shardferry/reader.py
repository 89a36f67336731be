"""Carry out the reads of a load plan: ranged, concurrent, straight into the arena.

First the heads of all needed items are read and parsed; they say where the raw bytes are and how they are strided. Then
the data: contiguous runs by positioned reads into place, strided boxes by a gather through a window. An item that can't be
read in ranges is read whole, by one thread, and the same requests are carried out on its content.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from shardferry.arena import Arena, HostArena
from shardferry.catalog import Catalog
from shardferry.collector import paused_gc
from shardferry.crew import Crew, cores
from shardferry.decode import ItemLayout
from shardferry.errors import SpecError, StorageError
from shardferry.extents import Extent, JoinLimits, join
from shardferry.items import ItemReader, StoredItem, TensorItem, items_of, object_item, tensor_item
from shardferry.plan import LoadPlan, ReadItem
from shardferry.requests import Request, requests_for
from shardferry.sharing import SharedPlan, SharedRead
from shardferry.sinks import Courier, PlacedRequest, PlacedSlab, make_sink
from shardferry.storage.base import ByteSource, RangeReader, Window
from shardferry.storage.memory import MemorySource
from shardferry.storage.runs import Runs

T = TypeVar("T")
Strategy = Literal["auto", "direct", "cooperative"]  # direct: every rank reads for itself
_BATCH_BYTES = 8 * 1024 * 1024  # of requests that one thread carries out in one go
_BATCH_HEADS = 64


def read_strategy(name: str) -> Strategy:
    """From its name. Raises SpecError."""
    known: dict[str, Strategy] = {"auto": "auto", "cooperative": "cooperative", "direct": "direct"}
    if name not in known:
        raise SpecError(f"strategy: {name!r} is none; there are {', '.join(known)}")
    return known[name]


class Counters:
    """What a rank has asked of storage so far; read by progress displays while it grows."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.num_requests = 0
        self.bytes_requested = 0
        self.bytes_done = 0  # of the needed ones

    def asked(self, *, num_requests: int, nbytes: int) -> None:
        """Storage was asked."""
        with self._lock:
            self.num_requests += num_requests
            self.bytes_requested += nbytes

    def done(self, nbytes: int) -> None:
        """Needed bytes are where they belong."""
        with self._lock:
            self.bytes_done += nbytes


class CountedSource:
    """A storage whose requests are counted as they are made."""

    def __init__(self, source: ByteSource, counters: Counters) -> None:
        self._source = source
        self._counters = counters

    def read_into(self, path: str, byte_offset: int, buffer: memoryview) -> None:
        self._counters.asked(num_requests=1, nbytes=len(buffer))
        self._source.read_into(path, byte_offset, buffer)

    def window(self, path: str, runs: Runs) -> Window:
        window = self._source.window(path, runs)
        self._counters.asked(num_requests=window.num_requests, nbytes=window.bytes_requested)
        return window


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """Knobs of reading. Their defaults for users stand in the stage's spec."""

    concurrency: int = 16  # requests in flight of this rank
    timeout_s: float | None = None  # for all reads of this rank
    strategy: Strategy = "auto"
    max_gap_bytes: int | None = None  # that may be read in vain between two items; None: as the storage likes it
    max_request_bytes: int | None = None  # of joined reads; None: as the storage likes it
    memory_budget_bytes: int = 1 << 30  # of reads in flight, and of messages to other ranks
    max_attempts: int = 5  # of a request that fails in passing
    node: str | None = None  # ranks with the same name share memory; None: found out


@dataclass(frozen=True, slots=True)
class _Piece:
    """A read item and where its first element goes."""

    item: ReadItem
    arena_offset: int  # bytes


@dataclass(slots=True)
class _Chunk:
    """A saved chunk of which this rank wants something."""

    item: TensorItem
    row: int  # of the catalog's tensors
    pieces: list[_Piece] = field(default_factory=list)
    shared: list[SharedRead] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes that are wanted of it."""
        own = sum(piece.item.source.numel for piece in self.pieces)
        delivered = sum(read.numel_wanted for read in self.shared)
        return (own + delivered) * self.item.dtype.itemsize

    @property
    def bytes_to_read(self) -> int:
        """Bytes of it that are read, without its head: a replica's are wanted twice and read once."""
        own = sum(piece.item.source.numel for piece in self.pieces)
        return (own + sum(read.region.numel for read in self.shared)) * self.item.dtype.itemsize


@dataclass(frozen=True, slots=True)
class _SmallChunks:
    """Chunks whose items are read in one request."""

    extent: Extent[_Chunk]

    @property
    def nbytes(self) -> int:
        """Bytes that are wanted."""
        return sum(chunk.nbytes for chunk in self.extent.members)


# What one thread does in one go; a chunk where its item has to be read whole.
_Work = PlacedRequest | PlacedSlab | _Chunk | _SmallChunks


@dataclass(frozen=True)
class Sharing:
    """What a rank reads for other ranks, and how that reaches them."""

    plan: SharedPlan
    courier: Courier
    rows: Mapping[str, int]  # of the catalog's tensors, by key


def read_plan(
    plan: LoadPlan,
    catalog: Catalog,
    storage: RangeReader,
    arena: Arena,
    options: ReadOptions,
    counters: Counters,
    sharing: Sharing | None = None,
) -> None:
    """Fill the arena as planned.

    Args:
        sharing: ranks read for each other; the arena is filled when all of them are done. Default: alone.

    Raises:
        StorageError: a file is missing, short, or not the one that the catalog was made of.
        DecodeError: an item is damaged or not what the metadata says.
    """
    chunks = _chunks_in_reading_order(plan, catalog, sharing)
    _check_ends((chunk.item for chunk in chunks), catalog, storage)
    source = CountedSource(storage, counters)
    placer, sink = _Placer(ItemReader(source)), make_sink(arena)
    courier = None if sharing is None else sharing.courier

    def carry_out_whole(chunk: _Chunk, content: bytes | memoryview) -> None:
        layout, memory = placer.layout_in(content, chunk.item), MemorySource(content)
        for request in placer.placed(chunk, layout, 0):
            sink.carry_out(request, memory)
        for slab in placer.slabs(chunk, layout):
            assert courier is not None
            courier.carry_out(slab, 0, memory)

    def carry_out(batch: Sequence[_Work]) -> None:
        for work in batch:
            if isinstance(work, _Chunk):
                carry_out_whole(work, placer.content(work.item))
            elif isinstance(work, _SmallChunks):
                for chunk, content in read_extent(work.extent, source):
                    carry_out_whole(chunk, content)
            elif isinstance(work, PlacedSlab):
                assert courier is not None
                courier.carry_out(work, work.item.byte_offset, source)
            else:
                sink.carry_out(work, source)
        counters.done(sum(work.nbytes for work in batch))

    # A GPU's arena is filled through staging buffers, whose copies want another thread's reads beside them.
    alone = isinstance(arena, HostArena) and cores() < 2 * plan.world_size
    with Crew(options.concurrency, timeout_s=options.timeout_s, alone=alone) as crew:
        with paused_gc():
            limits = JoinLimits.of(
                storage.traits, max_gap_bytes=options.max_gap_bytes, max_request_bytes=options.max_request_bytes
            )
            extents, alone_chunks = join(chunks, limits)
            works: list[_Work] = [_SmallChunks(extent) for extent in extents]
            works += [work for part in crew.run(placer.works, alone_chunks, _groups) for work in part]
        crew.run(carry_out, works, _batches)


def read_objects(
    keys: Sequence[str], catalog: Catalog, storage: RangeReader, options: ReadOptions, counters: Counters
) -> dict[str, Any]:
    """Some saved Python objects, by key. Raises StorageError, DecodeError."""
    with Crew(options.concurrency, timeout_s=options.timeout_s, alone=True) as crew:
        parts = crew.run(lambda part: {k: read_object(catalog, k, storage, counters) for k in part}, keys, _groups)
    return {key: value for part in parts for key, value in part.items()}


def read_object(catalog: Catalog, key: str, storage: RangeReader, counters: Counters) -> Any:
    """One saved Python object. Raises StorageError, DecodeError."""
    item = object_item(catalog, key)
    _check_inside(item, catalog, storage)
    value = ItemReader(CountedSource(storage, counters)).value(item)
    counters.done(item.byte_length)
    return value


def _chunks_in_reading_order(plan: LoadPlan, catalog: Catalog, sharing: Sharing | None) -> list[_Chunk]:
    """By file and position; each rank starts at another file, so that ranks don't queue for the same one."""
    chunks: dict[int, _Chunk] = {}

    def chunk_of(read: ReadItem | SharedRead) -> _Chunk:
        found = chunks.get(read.chunk)
        if found is None:
            tensor = plan.tensors[read.tensor]
            item = tensor_item(catalog, tensor.key, tensor.dtype, read.chunk_shape, read.chunk)
            row = -1 if sharing is None else sharing.rows[tensor.key]
            found = chunks[read.chunk] = _Chunk(item, row)
        return found

    for read in plan.reads if sharing is None else sharing.plan.own:
        tensor = plan.tensors[read.tensor]
        chunk_of(read).pieces.append(_Piece(read, tensor.arena_offset + read.offset * tensor.dtype.itemsize))
    for shared in () if sharing is None else sharing.plan.shared:
        chunk_of(shared).shared.append(shared)
    paths = sorted({chunk.item.path for chunk in chunks.values()})
    first = plan.world_rank * len(paths) // max(plan.world_size, 1)
    turn = {path: (place - first) % len(paths) for place, path in enumerate(paths)}
    return sorted(chunks.values(), key=lambda chunk: (turn[chunk.item.path], chunk.item.byte_offset))


def check_files(catalog: Catalog, keys: Iterable[str], storage: RangeReader) -> None:
    """Before anything is started or read: every file that holds something of ``keys`` is there, and as long as it was.

    Raises:
        StorageError: names the key, the file, and both lengths.
    """
    _check_ends((item for key in keys for item in items_of(catalog, key)), catalog, storage)


def _check_ends(items: Iterable[StoredItem], catalog: Catalog, storage: RangeReader) -> None:
    """Check the last item of each file."""
    last: dict[str, StoredItem] = {}
    for item in items:
        if item.path not in last or item.byte_stop > last[item.path].byte_stop:
            last[item.path] = item
    for item in last.values():
        _check_inside(item, catalog, storage)


def _check_inside(item: StoredItem, catalog: Catalog, storage: RangeReader) -> None:
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


class _Placer:
    """Turns chunks into requests with their places in files and in the arena."""

    def __init__(self, items: ItemReader) -> None:
        self._items = items
        self._known_requests: dict[tuple[object, ...], Sequence[Request]] = {}  # most pieces look like some other

    def works(self, chunks: Sequence[_Chunk]) -> list[_Work]:
        """The requests of all chunks that can be read in ranges, and the others as they are."""
        works: list[_Work] = []
        for chunk in chunks:
            if chunk.item.is_ranged:
                layout = self._items.layout(chunk.item)
                works += self.placed(chunk, layout, chunk.item.byte_offset)
                works += self.slabs(chunk, layout)
            else:
                works.append(chunk)
        return works

    def content(self, item: TensorItem) -> bytes:
        """The whole content of an item."""
        return self._items.content(item)

    def layout_in(self, content: bytes | memoryview, item: TensorItem) -> ItemLayout:
        """How an item's elements lie in its content."""
        return self._items.layout_in(content, item)

    def slabs(self, chunk: _Chunk, layout: ItemLayout) -> list[PlacedSlab]:
        """What is read of a chunk for several ranks."""
        return [PlacedSlab(chunk.item, chunk.row, layout, read) for read in chunk.shared]

    def placed(self, chunk: _Chunk, layout: ItemLayout, item_offset: int) -> list[PlacedRequest]:
        return [
            PlacedRequest(chunk.item.path, item_offset, piece.arena_offset, request)
            for piece in chunk.pieces
            for request in self._requests_of(piece.item, layout)
        ]

    def _requests_of(self, item: ReadItem, layout: ItemLayout) -> Sequence[Request]:
        """Of one piece; where they go is counted from the piece's place in the arena."""
        alike = (layout, item.source, item.strides)
        requests = self._known_requests.get(alike)
        if requests is None:
            requests = requests_for(
                layout,
                source_offsets=item.source.offsets,
                sizes=item.source.sizes,
                arena_offset=0,
                strides=item.strides,
            )
            self._known_requests[alike] = requests
        return requests


def read_extent(extent: Extent[_Chunk], source: ByteSource) -> Iterator[tuple[_Chunk, memoryview]]:
    """Each chunk of an extent with its item's bytes, out of one request."""
    data = memoryview(bytearray(extent.stop - extent.start))
    source.read_into(extent.path, extent.start, data)
    for chunk in extent.members:
        start = chunk.item.byte_offset - extent.start
        yield chunk, data[start : start + chunk.item.byte_length]


def _groups(units: Sequence[T]) -> list[Sequence[T]]:
    return [units[start : start + _BATCH_HEADS] for start in range(0, len(units), _BATCH_HEADS)]


def _batches(works: Sequence[_Work]) -> Iterator[list[_Work]]:
    batch: list[_Work] = []
    nbytes = 0
    for work in works:
        batch.append(work)
        nbytes += work.nbytes
        if nbytes >= _BATCH_BYTES:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch
