"""Carry out the reads of a load plan: ranged, concurrent, straight into the arena.

First the heads of all needed items are read and parsed; they say where the raw bytes are and how they are strided. Then
the data: contiguous runs by positioned reads into place, strided boxes by a gather through a window.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from shardferry.arena import Arena, DeviceArena, HostArena
from shardferry.catalog import NO_FILE, Catalog
from shardferry.collector import paused_gc
from shardferry.crew import Crew, cores
from shardferry.decode import HEAD_BYTES, MAX_HEAD_BYTES, HeadTooShort, ItemLayout, decode_object, parse_head
from shardferry.errors import DecodeError, StorageError
from shardferry.plan import LoadPlan, ReadItem
from shardferry.requests import Gather, InPlaceRead, Request, requests_for
from shardferry.storage.base import RangeReader

T = TypeVar("T")
_BATCH_BYTES = 8 * 1024 * 1024  # of requests that one thread carries out in one go
_BATCH_HEADS = 64


class Counters:
    """What a rank has asked of storage so far; read by progress displays while it grows."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.num_requests = 0
        self.bytes_requested = 0
        self.bytes_done = 0  # of the needed ones

    def add(self, *, num_requests: int, bytes_requested: int, bytes_done: int) -> None:
        with self._lock:
            self.num_requests += num_requests
            self.bytes_requested += bytes_requested
            self.bytes_done += bytes_done


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """Knobs of reading. Their defaults for users stand in the stage's spec."""

    concurrency: int = 16  # requests in flight of this rank
    timeout_s: float | None = None  # for all reads of this rank


@dataclass(frozen=True, slots=True)
class _Piece:
    """A read item with what is needed to carry it out."""

    item: ReadItem
    arena_offset: int  # bytes
    key: str


@dataclass(slots=True)
class _Chunk:
    """A saved chunk of which this rank wants something."""

    row: int  # of the catalog
    path: str
    byte_offset: int
    byte_length: int
    dtype: torch.dtype
    pieces: list[_Piece] = field(default_factory=list)

    @property
    def key(self) -> str:
        return self.pieces[0].key


@dataclass(frozen=True, slots=True)
class _PlacedRequest:
    """A request, which looks the same for all alike pieces, with its file and its places."""

    path: str
    item_offset: int  # bytes, of the item in its file
    arena_offset: int  # bytes, from where the request's own is counted
    request: Request


def read_plan(
    plan: LoadPlan, catalog: Catalog, storage: RangeReader, arena: Arena, options: ReadOptions, counters: Counters
) -> None:
    """Fill the arena as planned.

    Raises:
        StorageError: a file is missing or short.
        DecodeError: an item is damaged or not what the metadata says.
    """
    chunks = _chunks_in_reading_order(plan, catalog)
    _check_ends(((c.key, c.path, c.byte_offset, c.byte_length) for c in chunks), storage)
    heads, sink = _HeadReader(storage, counters), make_sink(arena, storage)

    def carry_out(batch: Sequence[_PlacedRequest]) -> None:
        for placed in batch:
            sink.carry_out(placed)
        nbytes = sum(placed.request.nbytes for placed in batch)
        counters.add(num_requests=len(batch), bytes_requested=nbytes, bytes_done=nbytes)

    # A GPU's arena is filled through staging buffers, whose copies want another thread's reads beside them.
    alone = isinstance(arena, HostArena) and cores() < 2 * plan.world_size
    with Crew(options.concurrency, timeout_s=options.timeout_s, alone=alone) as crew:
        with paused_gc():
            requests = [request for part in crew.run(heads.requests, chunks, _groups) for request in part]
        crew.run(carry_out, requests, _batches)


def read_objects(
    keys: Sequence[str], catalog: Catalog, storage: RangeReader, options: ReadOptions, counters: Counters
) -> dict[str, Any]:
    """Some saved Python objects, by key. Raises StorageError, DecodeError."""
    with Crew(options.concurrency, timeout_s=options.timeout_s, alone=True) as crew:
        parts = crew.run(lambda part: {k: read_object(catalog, k, storage, counters) for k in part}, keys, _groups)
    return {key: value for part in parts for key, value in part.items()}


def read_object(catalog: Catalog, key: str, storage: RangeReader, counters: Counters) -> Any:
    """One saved Python object. Raises StorageError, DecodeError."""
    saved = catalog.objects[key]
    path = catalog.files[saved.file]
    _check_inside(key, path, saved.byte_offset, saved.byte_length, storage)
    data = bytearray(saved.byte_length)
    storage.read_into(path, saved.byte_offset, memoryview(data))
    counters.add(num_requests=1, bytes_requested=len(data), bytes_done=len(data))
    try:
        return decode_object(bytes(data))
    except DecodeError as error:
        raise DecodeError(f"{key}: {path} at byte {saved.byte_offset}: {error}") from error


def _chunks_in_reading_order(plan: LoadPlan, catalog: Catalog) -> list[_Chunk]:
    """By file and position; each rank starts at another file, so that ranks don't queue for the same one."""
    chunks: dict[int, _Chunk] = {}
    for item in plan.reads:
        tensor = plan.tensors[item.tensor]
        chunk = chunks.get(item.chunk)
        if chunk is None:
            chunk = chunks[item.chunk] = _Chunk(
                item.chunk,
                catalog.files[catalog.chunk_file[item.chunk]],
                int(catalog.chunk_byte_offset[item.chunk]),
                int(catalog.chunk_byte_length[item.chunk]),
                tensor.dtype,
            )
        arena_offset = tensor.arena_offset + item.offset * tensor.dtype.itemsize
        chunk.pieces.append(_Piece(item, arena_offset, tensor.key))
        if item.chunk in catalog.transformed:
            raise DecodeError(
                f"{tensor.key}: its item in {chunk.path} was transformed (compressed) by the writer, which can't be read in "
                "ranges; save without transforms"
            )
    paths = sorted({chunk.path for chunk in chunks.values()})
    first = plan.world_rank * len(paths) // max(plan.world_size, 1)
    turn = {path: (place - first) % len(paths) for place, path in enumerate(paths)}
    return sorted(chunks.values(), key=lambda chunk: (turn[chunk.path], chunk.byte_offset))


def check_files(catalog: Catalog, keys: Iterable[str], storage: RangeReader) -> None:
    """Before anything is started or read: every file that holds something of ``keys`` is there, and long enough.

    Raises:
        StorageError: names the key, the file, and both lengths.
    """
    _check_ends(_extents(catalog, keys), storage)


def _extents(catalog: Catalog, keys: Iterable[str]) -> Iterator[tuple[str, str, int, int]]:
    """Key, file, byte offset and length of every stored item of some keys."""
    for key in keys:
        if (saved := catalog.objects.get(key)) is not None:
            yield key, catalog.files[saved.file], saved.byte_offset, saved.byte_length
            continue
        for chunk in catalog.tensors[key].chunks:
            if catalog.chunk_file[chunk] != NO_FILE:
                path = catalog.files[catalog.chunk_file[chunk]]
                yield key, path, int(catalog.chunk_byte_offset[chunk]), int(catalog.chunk_byte_length[chunk])


def _check_ends(extents: Iterable[tuple[str, str, int, int]], storage: RangeReader) -> None:
    """Check the last item of each file."""
    ends: dict[str, tuple[int, str, int, int]] = {}
    for key, path, byte_offset, byte_length in extents:
        end = byte_offset + byte_length
        if path not in ends or end > ends[path][0]:
            ends[path] = (end, key, byte_offset, byte_length)
    for path, (_, key, byte_offset, byte_length) in ends.items():
        _check_inside(key, path, byte_offset, byte_length, storage)


def _check_inside(key: str, path: str, byte_offset: int, byte_length: int, storage: RangeReader) -> None:
    try:
        size = storage.size(path)
    except StorageError as error:
        raise StorageError(f"{key}: {error}") from error
    if byte_offset + byte_length > size:
        raise StorageError(
            f"{key}: its item is bytes {byte_offset} to {byte_offset + byte_length} of {storage.location}/{path}, "
            f"which has {size} bytes; the file is cut, or the metadata is not of this checkpoint"
        )


class _HeadReader:
    """Reads and parses the heads of items. Equal heads (same shape, same dtype) are parsed once."""

    def __init__(self, storage: RangeReader, counters: Counters) -> None:
        self._storage = storage
        self._counters = counters
        self._parsed: dict[bytes, ItemLayout] = {}
        self._head_lengths: set[int] = set()
        self._known_requests: dict[tuple[object, ...], Sequence[Request]] = {}  # most pieces look like some other

    def requests(self, chunks: Sequence[_Chunk]) -> list[_PlacedRequest]:
        requests: list[_PlacedRequest] = []
        nbytes = 0
        for chunk in chunks:
            head, layout = self._layout(chunk)
            nbytes += len(head)
            _check_layout(chunk, layout)
            for piece in chunk.pieces:
                for request in self._requests_of(piece.item, layout):
                    requests.append(_PlacedRequest(chunk.path, chunk.byte_offset, piece.arena_offset, request))
        self._counters.add(num_requests=len(chunks), bytes_requested=nbytes, bytes_done=0)
        return requests

    def _layout(self, chunk: _Chunk) -> tuple[bytes, ItemLayout]:
        wanted = HEAD_BYTES
        while True:
            head = bytearray(min(wanted, chunk.byte_length))
            self._storage.read_into(chunk.path, chunk.byte_offset, memoryview(head))
            try:
                return bytes(head), self._parse(bytes(head))
            except HeadTooShort:
                if len(head) < wanted or wanted >= MAX_HEAD_BYTES:
                    raise _damaged(chunk, f"its header does not end within {len(head)} bytes") from None
                wanted *= 4
            except DecodeError as error:
                raise _damaged(chunk, str(error)) from error

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

    def _parse(self, head: bytes) -> ItemLayout:
        for length in self._head_lengths:
            if layout := self._parsed.get(head[:length]):
                return layout
        layout = parse_head(head)
        self._parsed[head[: layout.raw_start]] = layout
        self._head_lengths = self._head_lengths | {layout.raw_start}  # a new set: other threads may be iterating
        return layout


def _check_layout(chunk: _Chunk, layout: ItemLayout) -> None:
    shape = chunk.pieces[0].item.chunk_shape
    if layout.shape != shape or layout.dtype != chunk.dtype:
        raise _damaged(
            chunk, f"it holds {layout.dtype} of shape {layout.shape}, the metadata says {chunk.dtype} of shape {shape}"
        )
    if layout.storage_offset < 0 or any(stride < 0 for stride in layout.strides) or len(layout.strides) != len(shape):
        raise _damaged(chunk, f"its strides {layout.strides} from {layout.storage_offset} on make no tensor of {shape}")
    last = layout.byte_position(tuple(n - 1 for n in shape)) + layout.dtype.itemsize
    if last > chunk.byte_length:
        raise _damaged(chunk, f"its data ends at byte {last} of an item of {chunk.byte_length} bytes")


def _damaged(chunk: _Chunk, what: str) -> DecodeError:
    return DecodeError(f"{chunk.key}: item at byte {chunk.byte_offset} of {chunk.path}: {what}; the file is damaged")


def _groups(units: Sequence[T]) -> list[Sequence[T]]:
    return [units[start : start + _BATCH_HEADS] for start in range(0, len(units), _BATCH_HEADS)]


def _batches(requests: Sequence[_PlacedRequest]) -> Iterator[list[_PlacedRequest]]:
    batch: list[_PlacedRequest] = []
    nbytes = 0
    for request in requests:
        batch.append(request)
        nbytes += request.request.nbytes
        if nbytes >= _BATCH_BYTES:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch


class Sink(Protocol):
    """Carries out one request so that its bytes end up in the arena."""

    def carry_out(self, placed: _PlacedRequest) -> None: ...


def make_sink(arena: Arena, storage: RangeReader) -> Sink:
    return _HostSink(arena, storage) if isinstance(arena, HostArena) else _DeviceSink(arena, storage)


class _HostSink:
    def __init__(self, arena: HostArena, storage: RangeReader) -> None:
        self._memory = arena.memory
        self._storage = storage

    def carry_out(self, placed: _PlacedRequest) -> None:
        path, request = placed.path, placed.request
        arena_offset = placed.arena_offset + request.arena_offset
        if isinstance(request, InPlaceRead):
            place = self._memory[arena_offset : arena_offset + request.nbytes]
            self._storage.read_into(path, placed.item_offset + request.byte_offset, place)
            return
        start, stop = placed.item_offset + request.window_start, placed.item_offset + request.window_stop
        with self._storage.window(path, start=start, stop=stop) as window:
            target = _strided(self._memory, arena_offset, request.sizes, request.strides, request.itemsize)
            target[...] = _strided(window, 0, request.sizes, request.source_strides, request.itemsize)


class _DeviceSink:
    def __init__(self, arena: DeviceArena, storage: RangeReader) -> None:
        self._arena = arena
        self._storage = storage

    def carry_out(self, placed: _PlacedRequest) -> None:
        request = placed.request
        arena_offset = placed.arena_offset + request.arena_offset
        with self._arena.staging(request.nbytes) as staging:
            if isinstance(request, InPlaceRead):
                self._storage.read_into(placed.path, placed.item_offset + request.byte_offset, staging.numpy().data)
                self._arena.tensor(arena_offset, (request.nbytes,), torch.uint8).copy_(staging, non_blocking=True)
                return
            self._gather(placed, request, arena_offset, staging)

    def _gather(self, placed: _PlacedRequest, request: Gather, arena_offset: int, staging: torch.Tensor) -> None:
        start, stop = placed.item_offset + request.window_start, placed.item_offset + request.window_stop
        packed: np.ndarray[Any, Any] = staging.numpy().view(_ELEMENT[request.itemsize]).reshape(request.sizes)
        with self._storage.window(placed.path, start=start, stop=stop) as window:
            packed[...] = _strided(window, 0, request.sizes, request.source_strides, request.itemsize)
        dtype = _TORCH_ELEMENT[request.itemsize]
        arena = self._arena.tensor(0, (self._arena.nbytes // request.itemsize,), dtype)
        target = torch.as_strided(arena, request.sizes, request.strides, arena_offset // request.itemsize)
        target.copy_(staging.view(dtype).view(request.sizes), non_blocking=True)


_ELEMENT = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}
_TORCH_ELEMENT = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def _strided(
    memory: memoryview, byte_offset: int, sizes: tuple[int, ...], strides: tuple[int, ...], itemsize: int
) -> np.ndarray:
    byte_strides = tuple(stride * itemsize for stride in strides)
    return np.ndarray(sizes, dtype=_ELEMENT[itemsize], buffer=memory, offset=byte_offset, strides=byte_strides)
