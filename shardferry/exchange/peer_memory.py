"""Write into the arenas of the other ranks of a node, through the memory files that they are.

Where a tensor begins in a rank's arena stands in a directory behind the arena's data: one number for each tensor of the
catalog. Writes go through the file: mapping another rank's pages first would cost more than the copy.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from shardferry.arena import HostArena, open_memory_file
from shardferry.errors import StorageError

_SHORT_RUN = 4096  # bytes; shorter runs of a strided place are written through a mapping
_PACKED_BYTES = 256 * 1024  # that a thread packs before it writes them: out of a core's cache


@dataclass(frozen=True, slots=True)
class ArenaAddress:
    """Where another process of the node finds an arena."""

    pid: int
    descriptor: int
    inode: int
    directory_offset: int  # bytes; behind the data

    @classmethod
    def of(cls, arena: HostArena) -> ArenaAddress:
        """The address of an arena of this process."""
        return cls(os.getpid(), arena.descriptor, os.fstat(arena.descriptor).st_ino, arena.directory_offset)


class Places(Protocol):
    """Where the boxes for the ranks of an island go. Safe to use from several threads."""

    world_rank: int

    def memory_at(self, tensor: int, byte_offset: int, nbytes: int) -> memoryview | None:
        """A part of this rank's own arena; None where it can't be written in place."""

    def put(
        self, world_rank: int, tensor: int, byte_offset: int, block: np.ndarray, byte_strides: tuple[int, ...]
    ) -> None:
        """Write a block of elements into a rank's tensor; see `PeerArenas.put`."""


class PeerArenas:
    """The arenas of a node's ranks, this one's among them; opened when they are first written to."""

    def __init__(self, world_rank: int, arena: HostArena, addresses: Mapping[int, ArenaAddress]) -> None:
        self.world_rank = world_rank
        self._arena = arena
        self._addresses = addresses
        self._opened: dict[int, _Peer] = {}
        self._packing = _Packing()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for peer in self._opened.values():
            peer.close()

    def memory_at(self, tensor: int, byte_offset: int, nbytes: int) -> memoryview:
        start = int(self._arena.directory[tensor]) + byte_offset
        return self._arena.memory[start : start + nbytes]

    def put(
        self, world_rank: int, tensor: int, byte_offset: int, block: np.ndarray, byte_strides: tuple[int, ...]
    ) -> None:
        """Write a block of elements into a rank's tensor.

        Args:
            tensor: row of the catalog's tensors.
            byte_offset: of the block's first element, in the rank's local tensor.
            byte_strides: of the place, a step in each dimension of the block.

        Raises:
            StorageError: the rank's arena is gone.
        """
        if world_rank == self.world_rank:
            place = self._arena.directory[tensor] + byte_offset
            np.ndarray(block.shape, block.dtype, self._arena.memory, int(place), byte_strides)[...] = block
            return
        with self._lock:
            peer = self._opened.get(world_rank)
            if peer is None:
                address = self._addresses[world_rank]
                peer = self._opened[world_rank] = _Peer.open(world_rank, address, self._packing)
        peer.put(tensor, byte_offset, block, byte_strides)


class _Packing(threading.local):
    """Each thread's buffer to pack in, kept: fresh memory for every block would cost more than the copy."""

    def __init__(self) -> None:
        self.buffer = np.frombuffer(mmap.mmap(-1, _PACKED_BYTES), dtype=np.uint8)


class _Peer:
    def __init__(self, descriptor: int, directory: np.ndarray, packing: _Packing) -> None:
        self._descriptor = descriptor
        self._directory = directory
        self._packing = packing
        self._pages: mmap.mmap | None = None

    @classmethod
    def open(cls, world_rank: int, address: ArenaAddress, packing: _Packing) -> _Peer:
        gone = (
            f"the arena of rank {world_rank} (process {address.pid}) can't be opened: the rank has ended, or its memory is closed to "
            "this process; then set read.strategy: direct"
        )
        try:
            descriptor = open_memory_file(address.pid, address.descriptor, address.inode)
        except OSError as error:
            raise StorageError(f"{gone} ({error})") from error
        num_bytes = os.fstat(descriptor).st_size - address.directory_offset
        table = os.pread(descriptor, num_bytes, address.directory_offset)
        return cls(descriptor, np.frombuffer(table, dtype=np.int64), packing)

    def put(self, tensor: int, byte_offset: int, block: np.ndarray, byte_strides: tuple[int, ...]) -> None:
        start = int(self._directory[tensor]) + byte_offset
        outer = block.ndim - _contiguous_dims(block.shape, byte_strides, block.itemsize)
        run_bytes = block[(0,) * outer].nbytes
        if outer and run_bytes < _SHORT_RUN:
            np.ndarray(block.shape, block.dtype, self._mapped(), start, byte_strides)[...] = block
            return
        for index in np.ndindex(block.shape[:outer]):
            place = start + sum(i * s for i, s in zip(index, byte_strides, strict=False))
            self._write_packed(block[index], place)

    def _write_packed(self, block: np.ndarray, place: int) -> None:
        """Its elements one after another, which they need not be in the block."""
        if block.flags.c_contiguous:
            self._write(block.reshape(-1).view(np.uint8).data, place)
            return
        row_bytes = block[0].nbytes
        if row_bytes > _PACKED_BYTES:
            for number, row in enumerate(block):
                self._write_packed(row, place + number * row_bytes)
            return
        step = _PACKED_BYTES // row_bytes
        for first in range(0, len(block), step):
            rows = block[first : first + step]
            packed = self._packing.buffer[: rows.nbytes]
            np.copyto(packed.view(block.dtype).reshape(rows.shape), rows)
            self._write(packed.data, place + first * row_bytes)

    def _write(self, data: memoryview, place: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done:], place + done)

    def _mapped(self) -> mmap.mmap:
        if self._pages is None:
            self._pages = mmap.mmap(self._descriptor, 0, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        return self._pages

    def close(self) -> None:
        self._pages = None  # unmapped with its last array
        os.close(self._descriptor)


def _contiguous_dims(shape: tuple[int, ...], byte_strides: tuple[int, ...], itemsize: int) -> int:
    """How many of the last dimensions lie together in the place."""
    expected, count = itemsize, 0
    for size, stride in zip(reversed(shape), reversed(byte_strides), strict=True):
        if size != 1 and stride != expected:
            break
        expected *= size
        count += 1
    return count
