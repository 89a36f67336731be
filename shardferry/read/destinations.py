"""Bring the bytes of requests to where they belong: into this rank's arena, on the host or a GPU, or into other ranks' arenas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from shardferry.arena import Arena, DeviceArena, HostArena
from shardferry.exchange.peer_memory import Places
from shardferry.exchange.point_to_point import Outbox
from shardferry.plan.cooperative import SharedRead
from shardferry.plan.split import Delivery
from shardferry.read.buffers import Budget
from shardferry.read.items import TensorItem
from shardferry.read.requests import InPlaceRead, Request
from shardferry.region import Region, row_major_strides
from shardferry.stats import BusyTimes
from shardferry.storage.base import ByteSource
from shardferry.storage.memory import MemorySource


@dataclass(frozen=True, slots=True)
class PlacedRequest:
    """A request, which looks the same for all alike pieces, with its file and its places."""

    path: str
    item_offset: int  # bytes, of the item in its file
    arena_offset: int  # bytes, from where the request's own is counted
    request: Request

    @property
    def nbytes(self) -> int:
        """Bytes that are wanted."""
        return self.request.nbytes


@dataclass(frozen=True, slots=True)
class PlacedSlab:
    """A slab that is read for several ranks."""

    item: TensorItem
    row: int  # of the catalog's tensors
    read: SharedRead
    requests: Sequence[Request]  # that fill the slab, row-major

    @property
    def nbytes(self) -> int:
        """Bytes that are wanted, by all ranks together."""
        return self.read.numel_wanted * self.item.dtype.itemsize

    @property
    def nbytes_read(self) -> int:
        return self.read.numel * self.item.dtype.itemsize

    @property
    def start_in_item(self) -> int | None:
        """Bytes, where the item has the slab as it is; None where its elements lie there in another order."""
        start = self.requests[0].byte_offset
        for request in self.requests:
            if not isinstance(request, InPlaceRead) or request.byte_offset - start != request.arena_offset:
                return None
        return start


class Sink(Protocol):
    """Carries out one request so that its bytes end up in the arena."""

    def carry_out(self, placed: PlacedRequest, source: ByteSource) -> None: ...


def make_sink(arena: Arena, busy: BusyTimes) -> Sink:
    return HostSink(arena.memory) if isinstance(arena, HostArena) else DeviceSink(arena, busy)


class HostSink:
    def __init__(self, memory: memoryview) -> None:
        self._memory = memory

    def carry_out(self, placed: PlacedRequest, source: ByteSource) -> None:
        request, arena_offset = placed.request, placed.arena_offset + placed.request.arena_offset
        if isinstance(request, InPlaceRead):
            place = self._memory[arena_offset : arena_offset + request.nbytes]
            source.read_into(placed.path, placed.item_offset + request.byte_offset, place)
            return
        target = _strided(self._memory, arena_offset, request.sizes, request.strides, request.itemsize)
        with source.window(placed.path, request.runs(placed.item_offset)) as view:
            target[...] = _strided(view, 0, request.sizes, request.source_strides, request.itemsize)


@dataclass(frozen=True, slots=True)
class Ways:
    """How boxes reach other ranks."""

    places: Places  # on this island
    outbox: Outbox | None  # to other islands; None where there are none
    busy: BusyTimes


class Courier:
    """Reads slabs into buffers, and brings their boxes to the ranks that want them."""

    def __init__(self, ways: Ways, budget: Budget) -> None:
        self._places = ways.places
        self._outbox = ways.outbox
        self._busy = ways.busy
        self._budget = budget

    def carry_out(self, slab: PlacedSlab, item_offset: int, source: ByteSource) -> None:
        own = self._own_place(slab, row_major_strides(slab.read.region.sizes))
        if own is not None:
            self._fill(slab, item_offset, source, own)
            me = self._places.world_rank
            self._give(slab, own, [d for d in slab.read.deliveries if d.world_rank != me])
            return
        with self._budget.lease(slab.nbytes_read) as buffer:
            self._fill(slab, item_offset, source, buffer)
            self._give(slab, buffer, slab.read.deliveries)

    def carry_out_in(self, slab: PlacedSlab, content: memoryview) -> None:
        """The same of a slab whose item is in memory: out of its place there, where it lies in one piece."""
        start = slab.start_in_item
        if start is None:
            self.carry_out(slab, 0, MemorySource(content))
        else:
            self._give(slab, content[start : start + slab.nbytes_read], slab.read.deliveries)

    @staticmethod
    def _fill(slab: PlacedSlab, item_offset: int, source: ByteSource, buffer: memoryview) -> None:
        sink = HostSink(buffer)
        for request in slab.requests:
            sink.carry_out(PlacedRequest(slab.item.path, item_offset, 0, request), source)

    def _give(self, slab: PlacedSlab, content: memoryview, deliveries: Iterable[Delivery]) -> None:
        """Bring what is wanted of a slab to the ranks that want it."""
        block = Block(content, slab.read.region, slab.item.dtype.itemsize)
        for forward in slab.read.forwards:
            assert self._outbox is not None
            self._outbox.put(forward.relay, forward.index, block.part(forward.box))
        with self._busy.at("deliver"):
            deliver(block, deliveries, slab.row, self._places)

    def _own_place(self, slab: PlacedSlab, strides: tuple[int, ...]) -> memoryview | None:
        """Where this rank wants the whole slab as it is: then it is read there."""
        itemsize = slab.item.dtype.itemsize
        for delivery in slab.read.deliveries:
            as_it_is = delivery.source == slab.read.region and delivery.strides == strides
            if delivery.world_rank == self._places.world_rank and as_it_is:
                return self._places.memory_at(slab.row, delivery.offset * itemsize, slab.nbytes_read)
        return None


@dataclass(frozen=True, slots=True)
class Block:
    """A box of a chunk in memory, row-major."""

    memory: memoryview
    region: Region  # in the chunk, elements
    itemsize: int  # bytes

    def part(self, box: Region) -> np.ndarray:
        """A view of a box of it."""
        strides = row_major_strides(self.region.sizes)
        inside = box.relative_to(self.region.offsets)
        start = sum(o * s for o, s in zip(inside.offsets, strides, strict=True)) * self.itemsize
        return _strided(self.memory, start, inside.sizes, strides, self.itemsize)


def deliver(block: Block, deliveries: Iterable[Delivery], row: int, places: Places) -> None:
    """Bring the boxes of a block to ranks of this island.

    Args:
        row: of the catalog's tensors.

    Raises:
        StorageError: a rank's arena is gone.
    """
    for delivery in deliveries:
        byte_strides = tuple(stride * block.itemsize for stride in delivery.strides)
        part = block.part(delivery.source)
        places.put(delivery.world_rank, row, delivery.offset * block.itemsize, part, byte_strides)


class DevicePlace:
    """This rank's arena on a GPU, as the place of what other ranks read for it: an island by itself.

    Args:
        offsets: bytes, where each tensor begins in the arena, by row of the catalog's tensors.
    """

    def __init__(self, world_rank: int, arena: DeviceArena, offsets: Mapping[int, int]) -> None:
        self.world_rank = world_rank
        self._arena = arena
        self._offsets = offsets

    def memory_at(self, tensor: int, byte_offset: int, nbytes: int) -> None:
        return None

    def put(
        self, world_rank: int, tensor: int, byte_offset: int, block: np.ndarray, byte_strides: tuple[int, ...]
    ) -> None:
        assert world_rank == self.world_rank
        itemsize = block.itemsize
        with self._arena.staging(block.nbytes) as staging:
            np.copyto(staging.numpy().view(block.dtype).reshape(block.shape), block)
            strides = tuple(stride // itemsize for stride in byte_strides)
            place = self._offsets[tensor] + byte_offset
            _scatter(self._arena, _Scatter(place, block.shape, strides, itemsize), staging)


@dataclass(frozen=True, slots=True)
class _Scatter:
    """Where packed elements go in an arena."""

    arena_offset: int  # bytes
    sizes: tuple[int, ...]
    strides: tuple[int, ...]  # elements
    itemsize: int  # bytes


def _scatter(arena: DeviceArena, where: _Scatter, staging: torch.Tensor) -> None:
    dtype = _TORCH_ELEMENT[where.itemsize]
    elements = arena.tensor(0, (arena.nbytes // where.itemsize,), dtype)
    target = torch.as_strided(elements, where.sizes, where.strides, where.arena_offset // where.itemsize)
    target.copy_(staging.view(dtype).view(where.sizes), non_blocking=True)


class DeviceSink:
    def __init__(self, arena: DeviceArena, busy: BusyTimes) -> None:
        self._arena = arena
        self._busy = busy

    def carry_out(self, placed: PlacedRequest, source: ByteSource) -> None:
        with self._arena.staging(placed.nbytes) as staging:
            self._fill(staging, placed, source)
            with self._busy.at("device copy"):
                self._copy(staging, placed)
                self._arena.wait_for_copies()

    @staticmethod
    def _fill(staging: torch.Tensor, placed: PlacedRequest, source: ByteSource) -> None:
        request = placed.request
        if isinstance(request, InPlaceRead):
            source.read_into(placed.path, placed.item_offset + request.byte_offset, staging.numpy().data)
            return
        packed: np.ndarray[Any, Any] = staging.numpy().view(_ELEMENT[request.itemsize]).reshape(request.sizes)
        with source.window(placed.path, request.runs(placed.item_offset)) as view:
            packed[...] = _strided(view, 0, request.sizes, request.source_strides, request.itemsize)

    def _copy(self, staging: torch.Tensor, placed: PlacedRequest) -> None:
        request, arena_offset = placed.request, placed.arena_offset + placed.request.arena_offset
        if isinstance(request, InPlaceRead):
            self._arena.tensor(arena_offset, (request.nbytes,), torch.uint8).copy_(staging, non_blocking=True)
            return
        _scatter(self._arena, _Scatter(arena_offset, request.sizes, request.strides, request.itemsize), staging)


_ELEMENT = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}
_TORCH_ELEMENT = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def _strided(
    memory: memoryview, byte_offset: int, sizes: tuple[int, ...], strides: tuple[int, ...], itemsize: int
) -> np.ndarray:
    byte_strides = tuple(stride * itemsize for stride in strides)
    return np.ndarray(sizes, dtype=_ELEMENT[itemsize], buffer=memory, offset=byte_offset, strides=byte_strides)
