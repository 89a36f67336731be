"""Hold the memory that reads take beside the arena within a budget, and use its buffers again.

A thread claims what its next work will take, once, and waits for it while it holds nothing: so threads never wait for each
other in a ring. What it leases meanwhile comes out of its claim. First touches of fresh memory cost as much as the reads that
fill it, so buffers are kept for the next lease, as long as the budget has room for them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from shardferry.errors import StorageError

_LEAST_BUFFER = 4096  # bytes
_STEPS = 8  # sizes of buffers from one power of two to the next: at most an eighth of a buffer is not used


def buffer_bytes(nbytes: int) -> int:
    """Of the buffer that is leased for so many bytes."""
    if nbytes <= _LEAST_BUFFER:
        return _LEAST_BUFFER
    step = (1 << (nbytes - 1).bit_length()) // 2 // _STEPS
    return -(-nbytes // step) * step


class _Own(threading.local):
    """What one thread has claimed, and leased of it."""

    claimed = 0
    leased = 0


class Budget:
    """Bytes that the reads of a rank may hold beside the arena. What is larger than all of it is let through alone.

    Args:
        nbytes: buffers that wait for their next use among them.
        timeout_s: how long one claim waits.
    """

    def __init__(self, nbytes: int, *, timeout_s: float | None) -> None:
        self.nbytes = nbytes
        self.most_held_bytes = 0  # at any time, buffers that waited for their next use among them
        self._timeout_s = timeout_s
        self._held = 0  # bytes, claimed or leased
        self._idle = 0  # bytes of the buffers below
        self._buffers: dict[int, list[memoryview]] = {}  # by size; the last used comes first, as it may be in a cache
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()  # first come, first served: else many small claims starve a large one
        self._own = _Own()

    @contextmanager
    def claim(self, nbytes: int) -> Iterator[None]:
        """Room for what this thread leases or holds until the end of the ``with``. It may hold no other claim.

        Raises:
            StorageError: there was no room in time.
        """
        if self._own.claimed:
            raise RuntimeError(f"this thread has claimed {self._own.claimed} bytes already; it may wait for itself")
        self._take(nbytes)
        self._own.claimed = nbytes
        try:
            yield
        finally:
            self._own.claimed = 0
            self._give_back(nbytes)

    @contextmanager
    def lease(self, nbytes: int) -> Iterator[memoryview]:
        """A buffer, with whatever its last user left in it. Raises StorageError: there was no room in time."""
        size, own = buffer_bytes(nbytes), self._own
        beyond = min(size, max(0, own.leased + size - own.claimed))
        # Who holds something waits for nothing, as that could be for ever; the high-water mark tells.
        buffer = self._take(beyond, buffer_size=size, waits=not own.claimed and not own.leased)
        own.leased += size
        try:
            yield buffer[:nbytes]
        finally:
            own.leased -= size
            self._give_back(beyond, buffer)

    def _take(self, nbytes: int, *, buffer_size: int = 0, waits: bool = True) -> memoryview:
        """Room for so many bytes, and a buffer."""
        with self._changed:
            if waits and (self._queue or not self._fits(nbytes)):
                self._wait_for(nbytes)
            idle = self._buffers.get(buffer_size)
            buffer = idle.pop() if idle else None
            if buffer is not None:
                self._idle -= buffer_size
            self._held += nbytes
            while self._idle and self._held + self._idle > self.nbytes:
                self._drop_one()
            self.most_held_bytes = max(self.most_held_bytes, self._held + self._idle)
        return np.empty(buffer_size, dtype=np.uint8).data if buffer is None else buffer

    def _wait_for(self, nbytes: int) -> None:
        turn = object()
        self._queue.append(turn)
        try:
            if not self._changed.wait_for(lambda: self._queue[0] is turn and self._fits(nbytes), self._timeout_s):
                raise StorageError(
                    f"{nbytes} bytes of buffers were not free within {self._timeout_s:g} s (timeouts.load_s): other reads hold "
                    f"{self._held} of {self.nbytes} bytes (read.memory_budget); the storage doesn't answer, or raise either"
                )
        finally:
            self._queue.remove(turn)
            self._changed.notify_all()

    def _fits(self, nbytes: int) -> bool:
        return not self._held or self._held + nbytes <= self.nbytes

    def _drop_one(self) -> None:
        size = next(size for size, buffers in self._buffers.items() if buffers)
        self._buffers[size].pop(0)
        self._idle -= size

    def _give_back(self, nbytes: int, buffer: memoryview | None = None) -> None:
        with self._changed:
            self._held -= nbytes
            if buffer is not None and self._held + self._idle + len(buffer) <= self.nbytes:
                self._buffers.setdefault(len(buffer), []).append(buffer)
                self._idle += len(buffer)
            if self._queue:
                self._changed.notify_all()
