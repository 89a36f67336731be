"""Bytes in memory as a storage of one file: what was read whole is then read in ranges like everything else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from shardferry.errors import StorageError
from shardferry.storage.base import ByteRuns


class MemorySource:
    """One file's bytes. Reading them asks nothing of any storage."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data)

    def read_into(self, path: str, byte_offset: int, *buffers: memoryview) -> None:
        for buffer in buffers:
            buffer[:] = self._part(path, byte_offset, byte_offset + len(buffer))
            byte_offset += len(buffer)

    @contextmanager
    def window(self, path: str, runs: ByteRuns) -> Iterator[memoryview]:
        yield self._part(path, runs.start, runs.stop)

    def _part(self, path: str, start: int, stop: int) -> memoryview:
        if stop > len(self._data):
            raise StorageError(f"{path}: has {len(self._data)} bytes, but bytes {start} to {stop} are needed")
        return self._data[start:stop]
