"""Bring the bytes of requests to where they belong: into this rank's arena, on the host or a GPU, or into other ranks' arenas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from shardferry.arena import Arena, DeviceArena, HostArena
from shardferry.budget import Budget
from shardferry.items import TensorItem
from shardferry.peers import PeerArenas
from shardferry.region import row_major_strides
from shardferry.requests import Gather, InPlaceRead, Request
from shardferry.sharing import SharedRead
from shardferry.storage.base import ByteSource


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
        return sum(delivery.source.numel for delivery in self.read.deliveries) * self.item.dtype.itemsize


class Sink(Protocol):
    """Carries out one request so that its bytes end up in the arena."""

    def carry_out(self, placed: PlacedRequest, source: ByteSource) -> None: ...


def make_sink(arena: Arena) -> Sink:
    return HostSink(arena.memory) if isinstance(arena, HostArena) else DeviceSink(arena)


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


class Courier:
    """Reads slabs into buffers, and brings their boxes to the ranks that want them."""

    def __init__(self, peers: PeerArenas, budget: Budget) -> None:
        self._peers = peers
        self._budget = budget

    def carry_out(self, slab: PlacedSlab, item_offset: int, source: ByteSource) -> None:
        own = self._own_place(slab, row_major_strides(slab.read.region.sizes))
        if own is not None:
            self._deliver(slab, item_offset, source, self._peers.memory_at(*own), is_own=True)
            return
        with self._budget.lease(slab.read.numel * slab.item.dtype.itemsize) as buffer:
            self._deliver(slab, item_offset, source, buffer, is_own=False)

    def _deliver(
        self, slab: PlacedSlab, item_offset: int, source: ByteSource, buffer: memoryview, *, is_own: bool
    ) -> None:
        region, itemsize = slab.read.region, slab.item.dtype.itemsize
        strides = row_major_strides(region.sizes)
        sink = HostSink(buffer)
        for request in slab.requests:
            sink.carry_out(PlacedRequest(slab.item.path, item_offset, 0, request), source)
        for delivery in slab.read.deliveries:
            if is_own and delivery.world_rank == self._peers.world_rank:
                continue
            inside = delivery.source.relative_to(region.offsets)
            start = sum(o * s for o, s in zip(inside.offsets, strides, strict=True)) * itemsize
            block = _strided(buffer, start, inside.sizes, strides, itemsize)
            byte_strides = tuple(stride * itemsize for stride in delivery.strides)
            self._peers.put(delivery.world_rank, slab.row, delivery.offset * itemsize, block, byte_strides)

    def _own_place(self, slab: PlacedSlab, strides: tuple[int, ...]) -> tuple[int, int, int] | None:
        """Where this rank wants the whole slab as it is: then it is read there. Row, byte offset, length."""
        itemsize = slab.item.dtype.itemsize
        for delivery in slab.read.deliveries:
            as_it_is = delivery.source == slab.read.region and delivery.strides == strides
            if delivery.world_rank == self._peers.world_rank and as_it_is:
                return slab.row, delivery.offset * itemsize, slab.read.numel * itemsize
        return None


class DeviceSink:
    def __init__(self, arena: DeviceArena) -> None:
        self._arena = arena

    def carry_out(self, placed: PlacedRequest, source: ByteSource) -> None:
        request, arena_offset = placed.request, placed.arena_offset + placed.request.arena_offset
        with self._arena.staging(request.nbytes) as staging:
            if isinstance(request, InPlaceRead):
                source.read_into(placed.path, placed.item_offset + request.byte_offset, staging.numpy().data)
                self._arena.tensor(arena_offset, (request.nbytes,), torch.uint8).copy_(staging, non_blocking=True)
                return
            packed: np.ndarray[Any, Any] = staging.numpy().view(_ELEMENT[request.itemsize]).reshape(request.sizes)
            with source.window(placed.path, request.runs(placed.item_offset)) as view:
                packed[...] = _strided(view, 0, request.sizes, request.source_strides, request.itemsize)
            self._scatter(request, arena_offset, staging)

    def _scatter(self, request: Gather, arena_offset: int, staging: torch.Tensor) -> None:
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
