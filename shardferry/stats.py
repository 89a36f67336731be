"""Count and clock a rank's work: bytes, requests, phases, and how long it was at each kind of work."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class BusyTimes:
    """Seconds in which at least one thread was at a kind of work. Safe to use from several threads.

    Kinds overlap: a rank that reads while it sends is busy with both.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_threads: Counter[str] = Counter()
        self._since: dict[str, float] = {}
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def at(self, kind: str) -> Iterator[None]:
        """Count the time inside the ``with`` to a kind of work."""
        with self._lock:
            if not self._num_threads[kind]:
                self._since[kind] = time.perf_counter()
            self._num_threads[kind] += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_threads[kind] -= 1
                if not self._num_threads[kind]:
                    self._seconds[kind] += time.perf_counter() - self._since[kind]

    @property
    def seconds(self) -> Mapping[str, float]:
        """Seconds by kind, of work that has ended."""
        with self._lock:
            return dict(self._seconds)


class Counters:
    """What a rank has requested of storage so far; read by progress displays while it grows."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.num_requests = 0
        self.bytes_requested = 0
        self.bytes_done = 0  # wanted bytes that have reached their destination
        self.peak_buffer_bytes = 0  # held at once, beside the arena
        self.busy = BusyTimes()  # kinds: storage, deliver, exchange, device copy

    def add_requests(self, *, num_requests: int, nbytes: int) -> None:
        """Count requests to the storage, and the bytes that they ask for."""
        with self._lock:
            self.num_requests += num_requests
            self.bytes_requested += nbytes

    def add_completed(self, nbytes: int) -> None:
        """Count wanted bytes that have reached their destination."""
        with self._lock:
            self.bytes_done += nbytes

    def update_peak(self, buffer_bytes: int) -> None:
        """Note how many bytes of buffers were held at once."""
        with self._lock:
            self.peak_buffer_bytes = max(self.peak_buffer_bytes, buffer_bytes)


class PhaseClock:
    """Seconds by phase. Time in a phase inside another one counts to the inner one only."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner_s = 0.0  # of the phases inside the current one

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside the ``with`` to a phase."""
        start, outer_inner_s, self._inner_s = time.perf_counter(), self._inner_s, 0.0
        try:
            yield
        finally:
            spent_s = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent_s - self._inner_s
            self._inner_s = outer_inner_s + spent_s
