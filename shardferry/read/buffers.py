"""Keep the memory that reads hold beside the arena within a budget, and reuse buffers.

A task claims, once, as many bytes as it will hold at most, and waits for them while it holds nothing: so tasks never wait for
each other in a circle. First touches of fresh memory cost as much as the reads that fill it, so buffers are reused.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from shardferry.errors import StorageError

_MIN_BUFFER_BYTES = 4096
_STEPS = 8  # buffer sizes from one power of two to the next: at most an eighth of a buffer is unused


def buffer_bytes(nbytes: int) -> int:
    """Bytes of the buffer that holds ``nbytes``."""
    if nbytes <= _MIN_BUFFER_BYTES:
        return _MIN_BUFFER_BYTES
    step = (1 << (nbytes - 1).bit_length()) // 2 // _STEPS
    return -(-nbytes // step) * step


class BufferPool:
    """A byte semaphore with reused buffers. A claim above the whole budget is admitted alone.

    Args:
        budget_bytes: of all claims and all idle buffers.
        timeout_s: of the wait for one claim.
    """

    def __init__(self, budget_bytes: int, *, timeout_s: float | None) -> None:
        self.peak_bytes = 0  # claimed or idle at once
        self._budget_bytes = budget_bytes
        self._timeout_s = timeout_s
        self._claimed = 0  # bytes
        self._idle_bytes = 0
        self._idle: dict[int, list[memoryview]] = {}  # by size
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()  # first come, first served: else small claims starve a large one

    @property
    def num_waiting(self) -> int:
        """Claims that wait for room."""
        return len(self._queue)

    @contextmanager
    def claim(self, nbytes: int) -> Iterator[None]:
        """Reserve room until the end of the ``with``; a thread holds one claim at a time.

        Raises:
            StorageError: the room was not free in time.
        """
        with self._changed:
            if self._queue or not self._has_room(nbytes):
                self._wait_for(nbytes)
            self._claimed += nbytes
            while self._idle_bytes and self._claimed + self._idle_bytes > self._budget_bytes:
                size = next(size for size, buffers in self._idle.items() if buffers)
                self._idle[size].pop(0)
                self._idle_bytes -= size
            self.peak_bytes = max(self.peak_bytes, self._claimed + self._idle_bytes)
        try:
            yield
        finally:
            with self._changed:
                self._claimed -= nbytes
                if self._queue:
                    self._changed.notify_all()

    @contextmanager
    def buffer(self, nbytes: int) -> Iterator[memoryview]:
        """A buffer of at least ``nbytes``, cut to them, within the thread's claim; its content is undefined."""
        size = buffer_bytes(nbytes)
        with self._changed:
            idle = self._idle.get(size)
            buffer = idle.pop() if idle else None
            self._idle_bytes -= size if buffer is not None else 0
        if buffer is None:
            buffer = np.empty(size, dtype=np.uint8).data
        try:
            yield buffer[:nbytes]
        finally:
            with self._changed:  # the claim that covers it still counts: idle once more after that
                if self._claimed + self._idle_bytes <= self._budget_bytes:
                    self._idle.setdefault(size, []).append(buffer)
                    self._idle_bytes += size

    def _has_room(self, nbytes: int) -> bool:
        return not self._claimed or self._claimed + nbytes <= self._budget_bytes

    def _wait_for(self, nbytes: int) -> None:
        turn = object()
        self._queue.append(turn)
        try:
            if not self._changed.wait_for(lambda: self._queue[0] is turn and self._has_room(nbytes), self._timeout_s):
                raise StorageError(
                    f"{nbytes} bytes of buffers were not free within {self._timeout_s:g} s (timeouts.load_s): other reads hold "
                    f"{self._claimed} of {self._budget_bytes} bytes (read.memory_budget); the storage doesn't answer, or raise either"
                )
        finally:
            self._queue.remove(turn)
            self._changed.notify_all()
