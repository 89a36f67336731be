"""Clock how long a rank is at each kind of work, whatever number of its threads is at it at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class BusyTimes:
    """Seconds in which at least one thread was at a kind of work. Safe to use from several threads.

    Kinds overlap: a rank that reads while it sends is busy with both.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_threads: dict[str, int] = {}
        self._since: dict[str, float] = {}
        self._seconds: dict[str, float] = {}

    @contextmanager
    def at(self, kind: str) -> Iterator[None]:
        """This thread is at it during the ``with``."""
        self._begin(kind)
        try:
            yield
        finally:
            self._end(kind)

    def _begin(self, kind: str) -> None:
        with self._lock:
            others = self._num_threads.get(kind, 0)
            self._num_threads[kind] = others + 1
            if not others:
                self._since[kind] = time.perf_counter()

    def _end(self, kind: str) -> None:
        with self._lock:
            self._num_threads[kind] -= 1
            if not self._num_threads[kind]:
                spent = time.perf_counter() - self._since[kind]
                self._seconds[kind] = self._seconds.get(kind, 0.0) + spent

    @property
    def seconds(self) -> Mapping[str, float]:
        """By kind, of what has ended."""
        with self._lock:
            return dict(self._seconds)
