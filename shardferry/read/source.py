"""Turn a storage into what the reader's parts ask: every request counted, every buffer out of one budget.

The head of a saved item and its first data are one request wherever they lie side by side: `HeadedSource` reads the head along
with the first request of the data, and lets nothing pass before the head has said that the data is where it was looked for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from shardferry.read.buffers import Budget
from shardferry.stats import BusyTimes
from shardferry.storage.base import ByteRuns, RangeReader


class Counters:
    """What a rank has asked of storage so far; read by progress displays while it grows."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.num_requests = 0
        self.bytes_requested = 0
        self.bytes_done = 0  # of the needed ones
        self.most_buffer_bytes = 0  # held at any time, beside the arena
        self.busy = BusyTimes()  # storage, deliver, exchange, device copy

    def asked(self, *, num_requests: int, nbytes: int) -> None:
        """Storage was asked."""
        with self._lock:
            self.num_requests += num_requests
            self.bytes_requested += nbytes

    def done(self, nbytes: int) -> None:
        """Needed bytes are where they belong."""
        with self._lock:
            self.bytes_done += nbytes

    def held(self, nbytes: int) -> None:
        """So many bytes were held in buffers at once."""
        with self._lock:
            self.most_buffer_bytes = max(self.most_buffer_bytes, nbytes)


class StorageSource:
    """A storage whose requests are counted as they are made, and whose windows are buffers of a budget."""

    def __init__(self, storage: RangeReader, counters: Counters, budget: Budget) -> None:
        self.budget = budget
        self.maps_files = storage.traits.maps_files
        self._storage = storage
        self._counters = counters

    def read_into(self, path: str, byte_offset: int, *buffers: memoryview) -> None:
        nbytes = len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))
        self._counters.asked(num_requests=1, nbytes=nbytes)
        with self._counters.busy.at("storage"):
            self._storage.read_into(path, byte_offset, *buffers)

    @contextmanager
    def window(self, path: str, runs: ByteRuns) -> Iterator[memoryview]:
        with self.window_from(path, runs.start, runs, num_before=0) as view:
            yield view

    @contextmanager
    def window_from(self, path: str, start: int, runs: ByteRuns, *, num_before: int) -> Iterator[memoryview]:
        """A window that begins before its runs, of which the first ``num_before`` bytes are looked at too."""
        if self.maps_files:
            self._counters.asked(num_requests=1, nbytes=num_before + runs.nbytes)
            with self._counters.busy.at("storage"):  # pages are read where they are looked at
                yield self._storage.mapped(path, start, runs.stop)
            return
        with self.budget.lease(runs.stop - start) as buffer:
            self.read_into(path, start, buffer)
            yield buffer


class WrongGuess(Exception):
    """An item's head says that its data is elsewhere than it was looked for."""


class HeadedSource:
    """A storage that checks one item's head with the first request for its data.

    Args:
        start: bytes, of the item in its file.
        head_bytes: up to where its data is expected.
        is_right: whether a head is as expected.
    """

    def __init__(
        self, source: StorageSource, path: str, start: int, head_bytes: int, is_right: Callable[[memoryview], bool]
    ) -> None:
        self._source = source
        self._path = path
        self._start = start
        self._head_bytes = head_bytes
        self._is_right = is_right
        self._is_checked = False

    def check_head(self) -> None:
        """Read the head alone. Raises StorageError, WrongGuess."""
        with self._source.budget.lease(self._head_bytes) as head:
            self._source.read_into(self._path, self._start, head)
            self._check(head)

    def read_into(self, path: str, byte_offset: int, *buffers: memoryview) -> None:
        """As any; the first reads what is before as well, from the item's start on. Raises StorageError, WrongGuess."""
        if self._is_checked:
            self._source.read_into(path, byte_offset, *buffers)
            return
        with self._source.budget.lease(byte_offset - self._start) as before:
            self._source.read_into(path, self._start, before, *buffers)
            self._check(before[: self._head_bytes])

    @contextmanager
    def window(self, path: str, runs: ByteRuns) -> Iterator[memoryview]:
        """As any; the first begins at the item's start. Raises StorageError, WrongGuess."""
        if self._is_checked:
            with self._source.window(path, runs) as view:
                yield view
            return
        with self._source.window_from(path, self._start, runs, num_before=self._head_bytes) as view:
            self._check(view[: self._head_bytes])
            yield view[runs.start - self._start :]

    def _check(self, head: memoryview) -> None:
        if not self._is_right(head):
            raise WrongGuess
        self._is_checked = True
