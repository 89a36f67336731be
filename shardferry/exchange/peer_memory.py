"""Write into the arenas of the node's other ranks, through their memory files.

A directory behind an arena's data gives the byte offset of each tensor: one number per tensor of the catalog. Writes go through
the file; mapping another rank's pages first would cost more than the copy.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

from shardferry.arena import HostArena, open_memory_file
from shardferry.errors import StorageError

_SHORT_RUN_BYTES = 4096  # shorter runs of a strided destination are written through a mapping
_PACKED_BYTES = 256 * 1024  # that a thread packs before it writes them, out of a core's cache


@dataclass(frozen=True, slots=True)
class ArenaAddress:
    """How another process of the node opens an arena."""

    pid: int
    descriptor: int
    inode: int
    directory_offset: int  # bytes; behind the data

    @classmethod
    def of(cls, arena: HostArena) -> ArenaAddress:
        """The address of an arena of this process."""
        return cls(os.getpid(), arena.descriptor, os.fstat(arena.descriptor).st_ino, arena.directory_offset)


class PeerArenas:
    """The arenas of the node's other ranks; each is opened when it is first written to. Safe to use from several threads.

    Args:
        addresses: by world rank.
    """

    def __init__(self, addresses: Mapping[int, ArenaAddress]) -> None:
        self._addresses = addresses
        self._opened: dict[int, _Peer] = {}
        self._packing = _Packing()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for peer in self._opened.values():
            peer.close()

    def put(
        self, world_rank: int, tensor: int, byte_offset: int, block: np.ndarray, byte_strides: tuple[int, ...]
    ) -> None:
        """Write a block of elements into a rank's tensor.

        Args:
            tensor: row of the catalog's tensors.
            byte_offset: of the block's first element, in the rank's local tensor.
            byte_strides: of the destination, one step in each dimension of the block.

        Raises:
            StorageError: the rank's arena is gone.
        """
        with self._lock:
            peer = self._opened.get(world_rank)
            if peer is None:
                address = self._addresses[world_rank]
                peer = self._opened[world_rank] = _Peer.open(world_rank, address, self._packing)
        peer.put(tensor, byte_offset, block, byte_strides)


class _Packing(threading.local):
    """Each thread's packing buffer, kept: fresh memory for every block would cost more than the copy."""

    def __init__(self) -> None:
        self.buffer = np.frombuffer(mmap.mmap(-1, _PACKED_BYTES), dtype=np.uint8)


class _Peer:
    """Another rank's arena."""

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
        if outer and run_bytes < _SHORT_RUN_BYTES:
            np.ndarray(block.shape, block.dtype, self._mapped(), start, byte_strides)[...] = block
            return
        for index in np.ndindex(block.shape[:outer]):
            at = start + sum(i * s for i, s in zip(index, byte_strides, strict=False))
            self._write_packed(block[index], at)

    def _write_packed(self, block: np.ndarray, byte_offset: int) -> None:
        """Write a block's elements as one contiguous run."""
        if block.flags.c_contiguous:
            self._write(block.reshape(-1).view(np.uint8).data, byte_offset)
            return
        row_bytes = block[0].nbytes
        if row_bytes > _PACKED_BYTES:
            for number, row in enumerate(block):
                self._write_packed(row, byte_offset + number * row_bytes)
            return
        step = _PACKED_BYTES // row_bytes
        for first in range(0, len(block), step):
            rows = block[first : first + step]
            packed = self._packing.buffer[: rows.nbytes]
            np.copyto(packed.view(block.dtype).reshape(rows.shape), rows)
            self._write(packed.data, byte_offset + first * row_bytes)

    def _write(self, data: memoryview, byte_offset: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done:], byte_offset + done)

    def _mapped(self) -> mmap.mmap:
        if self._pages is None:
            self._pages = mmap.mmap(self._descriptor, 0, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        return self._pages

    def close(self) -> None:
        self._pages = None  # unmapped with its last array
        os.close(self._descriptor)


def _contiguous_dims(shape: tuple[int, ...], byte_strides: tuple[int, ...], itemsize: int) -> int:
    """How many of the last dimensions are contiguous in the destination."""
    expected, count = itemsize, 0
    for size, stride in zip(reversed(shape), reversed(byte_strides), strict=True):
        if size != 1 and stride != expected:
            break
        expected *= size
        count += 1
    return count
