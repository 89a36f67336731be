"""Carry out many small reads: on one thread as long as none of them waits for the storage, then on as many as bring more.

Where the page cache or a memory file has everything, reading is copying: with several ranks on a few cores, more threads
only get in each other's way (on 2 cores, 16 threads take 1.3 times the CPU of one). Where a read has to wait, many must
be under way at once. The kernel tells which it is: it counts how often a thread gave up its core to wait. How many is
found out by trying (`shardferry.read.ramp`): threads are added while more of them bring more.
"""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Generic, Self, TypeVar

from shardferry.errors import StorageError
from shardferry.read.ramp import Ramp

T = TypeVar("T")
R = TypeVar("R")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


class Crew:
    """Threads of one rank; they end with the ``with``.

    Args:
        num_threads: at most so many.
        first_threads: so many begin; more come as long as that brings more.
        timeout_s: for all work of this crew, from now on.
        alone: begin on the caller's thread, and go on there until something has waited.
    """

    def __init__(self, num_threads: int, *, first_threads: int, timeout_s: float | None, alone: bool) -> None:
        self._pool = ThreadPoolExecutor(max_workers=num_threads, thread_name_prefix="shardferry-read")
        self._ramp = Ramp(first=first_threads, most=num_threads)
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._alone = alone

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def run(
        self,
        work: Callable[[Sequence[T]], R],
        units: Sequence[T],
        batches: Callable[[Sequence[T]], Iterable[Sequence[T]]],
        amount: Callable[[Sequence[T]], int] = len,
    ) -> list[R]:
        """Call ``work`` with all units, some at a time; results in order.

        The first failure cancels what has not begun and is raised.

        Args:
            batches: cuts units into what one thread does in one go.
            amount: bytes of a batch, or whatever else of which more a second is better.

        Raises:
            StorageError: not done in time.
        """
        results: list[R] = []
        while self._alone and len(results) < len(units):
            waits = _waits_of_this_thread()
            results.append(work(units[len(results) : len(results) + 1]))
            self._alone = waits == _waits_of_this_thread()
            if self._remaining_s() == 0 and len(results) < len(units):
                raise _late(len(units) - len(results), len(units))
        rest = list(batches(units[len(results) :]))
        if not rest:
            return results
        shift = _Shift(work, rest, amount, self._ramp)
        return results + shift.carried_out(self._pool, self._remaining_s)

    def _remaining_s(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())


class _Shift(Generic[T, R]):
    """Some batches, and the threads that take one after the other."""

    def __init__(
        self,
        work: Callable[[Sequence[T]], R],
        batches: Sequence[Sequence[T]],
        amount: Callable[[Sequence[T]], int],
        ramp: Ramp,
    ) -> None:
        self._work = work
        self._batches = batches
        self._amount = amount
        self._ramp = ramp
        self._results: dict[int, R] = {}
        self._lock = threading.Lock()
        self._next = 0  # batch to begin
        self._threads = 0  # that take batches
        self._hired: list[Future[None]] = []

    def carried_out(self, pool: ThreadPoolExecutor, remaining_s: Callable[[], float | None]) -> list[R]:
        """The results of all batches, in order. Raises StorageError: not done in time; and whatever a batch raises."""
        with self._lock:
            self._ramp.begin(time.monotonic())
            self._hire(pool)
        try:
            while unfinished := [future for future in self._all() if not future.done()]:
                if not wait(unfinished, timeout=remaining_s(), return_when=FIRST_EXCEPTION).done:
                    raise _late(len(self._batches) - len(self._results), len(self._batches))
                self._raise_failures()
            self._raise_failures()
        finally:
            with self._lock:
                self._next = len(self._batches)  # nobody begins another
        return [self._results[place] for place in range(len(self._batches))]

    def _all(self) -> list[Future[None]]:
        with self._lock:
            return list(self._hired)

    def _raise_failures(self) -> None:
        for future in self._all():
            if future.done():
                future.result()

    def _hire(self, pool: ThreadPoolExecutor) -> None:
        """As many threads as may be under way; called with the lock held."""
        while self._threads < min(self._ramp.limit, self._threads + len(self._batches) - self._next):
            self._threads += 1
            self._hired.append(pool.submit(self._take_batches, pool))

    def _take_batches(self, pool: ThreadPoolExecutor) -> None:
        try:
            while (place := self._take()) is not None:
                batch = self._batches[place]
                result = self._work(batch)
                with self._lock:
                    self._results[place] = result
                    self._ramp.done(self._amount(batch), time.monotonic())
                    self._hire(pool)
        except BaseException:
            with self._lock:
                self._next = len(self._batches)
            raise

    def _take(self) -> int | None:
        """The next batch; None where there is none, or where this thread is one too many."""
        with self._lock:
            if self._next >= len(self._batches) or self._threads > self._ramp.limit:
                self._threads -= 1
                return None
            self._next += 1
            return self._next - 1


def _waits_of_this_thread() -> int:
    """How often it has given up its core of itself: to wait for storage, or for Python's lock."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


def _late(num_left: int, num_all: int) -> StorageError:
    return StorageError(
        f"{num_left} of {num_all} reads are not done within timeouts.load_s; raise it, or look at the storage"
    )
