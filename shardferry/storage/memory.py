"""Bytes in memory as a storage of one file: what was read whole is then read in ranges like everything else."""

from __future__ import annotations

from shardferry.errors import StorageError
from shardferry.storage.base import Window
from shardferry.storage.runs import Runs


class MemorySource:
    """One file's bytes. Reading them asks nothing of any storage."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data)

    def read_into(self, path: str, byte_offset: int, buffer: memoryview) -> None:
        buffer[:] = self._part(path, byte_offset, byte_offset + len(buffer))

    def window(self, path: str, runs: Runs) -> Window:
        return Window(self._part(path, runs.start, runs.stop), num_requests=0, bytes_requested=0)

    def _part(self, path: str, start: int, stop: int) -> memoryview:
        if stop > len(self._data):
            raise StorageError(f"{path}: has {len(self._data)} bytes, but bytes {start} to {stop} are needed")
        return self._data[start:stop]
