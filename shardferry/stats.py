"""Count and clock a rank's work: bytes, requests, phases, and how long it was at each kind of work."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Work:
    """One kind of work, from its first start to its last end. There may be pauses in between."""

    kind: str
    start: float  # seconds since the epoch
    end: float


class BusyTimes:
    """Seconds in which at least one thread was at a kind of work. Safe to use from several threads.

    Kinds overlap: a rank that reads while it sends is busy with both.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._epoch = time.time() - time.perf_counter()
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._num_threads: Counter[str] = Counter()
        self._since: dict[str, float] = {}
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def at(self, kind: str) -> Iterator[None]:
        """Count the time inside the ``with`` to a kind of work."""
        with self._lock:
            if not self._num_threads[kind]:
                self._since[kind] = time.perf_counter()
                self._first.setdefault(kind, self._since[kind])
            self._num_threads[kind] += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_threads[kind] -= 1
                if not self._num_threads[kind]:
                    self._last[kind] = time.perf_counter()
                    self._seconds[kind] += self._last[kind] - self._since[kind]

    @property
    def seconds(self) -> Mapping[str, float]:
        """Seconds by kind, of work that has ended."""
        with self._lock:
            return dict(self._seconds)

    @property
    def work(self) -> tuple[Work, ...]:
        """When each kind of work was done, of work that has ended."""
        with self._lock:
            return tuple(
                Work(kind, self._epoch + self._first[kind], self._epoch + end) for kind, end in self._last.items()
            )


@dataclass(frozen=True, slots=True)
class StorageRequest:
    """One request to the storage."""

    path: str
    nbytes: int
    start: float  # seconds since the epoch
    seconds: float


class RequestLog:
    """The requests of a load: all of them, else every second, every fourth, ... of them.

    Args:
        most: how many are kept at most.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._stride, self._count = 1, 0
        self._kept: list[StorageRequest] = []

    def add(self, request: StorageRequest) -> None:
        """Keep a request, if it is its turn."""
        if self._count % self._stride == 0:
            if len(self._kept) == self._most:
                self._kept, self._stride = self._kept[::2], 2 * self._stride
            if self._count % self._stride == 0:
                self._kept.append(request)
        self._count += 1

    def kept(self) -> tuple[StorageRequest, ...]:
        """The requests that are kept, in the order in which they ended."""
        return tuple(self._kept)


class Counters:
    """What a rank has requested of storage so far; read by progress displays while it grows.

    Args:
        total: counters of several loads, which grow with these.
        requests_kept: how many requests are kept one by one, at most.
    """

    def __init__(self, total: Counters | None = None, *, requests_kept: int = 10_000) -> None:
        self._lock = threading.Lock()
        self._total = total
        self.num_requests = 0
        self.bytes_requested = 0
        self.bytes_done = 0  # wanted bytes that have reached their destination
        self.num_retries = 0  # of requests
        self.phase = ""  # the current one
        self.peak_buffer_bytes = 0  # held at once, beside the arena
        self.file_bytes: dict[str, int] = {}  # asked for, by path
        self.requests = RequestLog(requests_kept)
        self.busy = BusyTimes()  # kinds: storage, deliver, exchange, device copy

    @contextmanager
    def request(self, path: str, nbytes: int) -> Iterator[None]:
        """Count a request to the storage, and clock it."""
        self._add_request(path, nbytes)
        start, begun = time.time(), time.perf_counter()
        with self.busy.at("storage"):
            yield
        request = StorageRequest(path, nbytes, start, time.perf_counter() - begun)
        with self._lock:
            self.requests.add(request)

    def _add_request(self, path: str, nbytes: int) -> None:
        with self._lock:
            self.num_requests += 1
            self.bytes_requested += nbytes
            self.file_bytes[path] = self.file_bytes.get(path, 0) + nbytes
        if self._total is not None:
            self._total._add_request(path, nbytes)

    def add_completed(self, nbytes: int) -> None:
        """Count wanted bytes that have reached their destination."""
        with self._lock:
            self.bytes_done += nbytes
        if self._total is not None:
            self._total.add_completed(nbytes)

    def add_retry(self) -> None:
        """Count another attempt of a request."""
        with self._lock:
            self.num_retries += 1
        if self._total is not None:
            self._total.add_retry()

    def enter(self, phase: str) -> None:
        """Note which phase begins."""
        self.phase = phase
        if self._total is not None:
            self._total.enter(phase)

    def update_peak(self, buffer_bytes: int) -> None:
        """Note how many bytes of buffers were held at once."""
        with self._lock:
            self.peak_buffer_bytes = max(self.peak_buffer_bytes, buffer_bytes)


class PhaseClock:
    """Seconds by phase. Time in a phase inside another one counts to the inner one only.

    Args:
        on_phase: called with the name of each phase that begins.
    """

    def __init__(self, on_phase: Callable[[str], None] = lambda phase: None) -> None:
        self._on_phase = on_phase
        self.seconds: dict[str, float] = {}
        self._inner_s = 0.0  # of the phases inside the current one

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside the ``with`` to a phase."""
        self._on_phase(name)
        start, outer_inner_s, self._inner_s = time.perf_counter(), self._inner_s, 0.0
        try:
            yield
        finally:
            spent_s = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent_s - self._inner_s
            self._inner_s = outer_inner_s + spent_s
