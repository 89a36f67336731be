"""The floor under every load: equal contiguous shares of the needed bytes, fetched into memory, and nothing else."""

from __future__ import annotations

import http.client
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch

from benchmarks.checkpoint import data_files
from benchmarks.task import Contender, Task, WrongResult

_READ_BYTES = 8 * 1024 * 1024  # that one call or one request fetches
_CONNECTIONS = 8  # of each rank


@dataclass(frozen=True, slots=True)
class _Range:
    """Bytes of one file, and where they go."""

    file: str
    byte_offset: int
    place: memoryview


class Floor(Contender):
    """As many bytes as are needed, from the same files: with ``pread``, or with ranged GETs over a few connections."""

    name = "floor"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._start, stop = (task.needed_bytes * rank // task.case.ranks for rank in (task.rank, task.rank + 1))
        self._share = stop - self._start
        self._sizes = [(file.name, file.stat().st_size) for file in data_files(task.store.directory)]
        self._memory: torch.Tensor | None = None
        self._done = 0

    def prepare(self) -> None:
        self._memory = torch.zeros(self._share, dtype=torch.uint8).fill_(1)

    def load(self) -> None:
        if self._memory is None:
            self._memory = torch.empty(self._share, dtype=torch.uint8)
        ranges = list(_cut(self._sizes, self._start, memoryview(self._memory.numpy().data)))
        store = self._task.store
        self._done = _fetch(store.location, ranges) if store.is_remote else _read(store.directory, ranges)

    def check(self) -> None:
        if self._done != self._share:
            raise WrongResult(f"{self.name}, {self._task.case.name}: {self._done} of {self._share} bytes were read")

    def release(self) -> None:
        self._memory = None


def _cut(files: Sequence[tuple[str, int]], start: int, memory: memoryview) -> Iterator[_Range]:
    """The part of all files, one after another, that begins at ``start`` and fills the memory."""
    position = done = 0  # of a file's first byte
    for file, nbytes in files:
        while done < len(memory) and start + done < position + nbytes:
            offset = start + done - position
            count = min(_READ_BYTES, nbytes - offset, len(memory) - done)
            yield _Range(file, offset, memory[done : done + count])
            done += count
        position += nbytes


def _read(directory: str, ranges: Sequence[_Range]) -> int:
    done = 0
    descriptors = {file: os.open(Path(directory, file), os.O_RDONLY) for file in {part.file for part in ranges}}
    try:
        for part in ranges:
            got = 0
            while got < len(part.place):
                count = os.preadv(descriptors[part.file], [part.place[got:]], part.byte_offset + got)
                if not count:
                    break
                got += count
            done += got
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
    return done


def _fetch(location: str, ranges: Sequence[_Range]) -> int:
    url = urlsplit(location)

    def fetch(part_of_ranges: Sequence[_Range]) -> int:
        done = 0
        connection = http.client.HTTPConnection(url.netloc, timeout=60)
        try:
            for part in part_of_ranges:
                last = part.byte_offset + len(part.place) - 1
                connection.request(
                    "GET", f"{url.path}/{part.file}", headers={"Range": f"bytes={part.byte_offset}-{last}"}
                )
                response = connection.getresponse()
                got = 0
                while count := response.readinto(part.place[got:]):
                    got += count
                done += got
        finally:
            connection.close()
        return done

    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        return sum(pool.map(fetch, [ranges[first::_CONNECTIONS] for first in range(min(_CONNECTIONS, len(ranges)))]))
