"""Carry out many small reads: on one thread as long as none of them waits for the storage, then on several.

Where the page cache or a memory file has everything, reading is copying: with several ranks on a few cores, more threads
only get in each other's way (on 2 cores, 16 threads take 1.3 times the CPU of one). Where a read has to wait, many must
be under way at once. The kernel tells which it is: it counts how often a thread gave up its core to wait.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Self, TypeVar

from shardferry.errors import StorageError

T = TypeVar("T")
R = TypeVar("R")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


class Crew:
    """Threads of one rank; they end with the ``with``.

    Args:
        num_threads: at most so many.
        timeout_s: for all work of this crew, from now on.
        alone: begin on the caller's thread, and go on there until something has waited.
    """

    def __init__(self, num_threads: int, *, timeout_s: float | None, alone: bool) -> None:
        self._pool = ThreadPoolExecutor(max_workers=num_threads, thread_name_prefix="shardferry-read")
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
    ) -> list[R]:
        """Call ``work`` with all units, some at a time; results in order.

        The first failure cancels what has not begun and is raised.

        Args:
            batches: cuts units into what one thread does in one go.

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
        return results + self._run_together(work, list(batches(units[len(results) :])))

    def _run_together(self, work: Callable[[Sequence[T]], R], batches: Sequence[Sequence[T]]) -> list[R]:
        futures: list[Future[R]] = [self._pool.submit(work, batch) for batch in batches]
        done, pending = wait(futures, timeout=self._remaining_s(), return_when=FIRST_EXCEPTION)
        for future in pending:
            future.cancel()
        for future in done:
            future.result()
        if pending:
            raise _late(len(pending), len(futures))
        return [future.result() for future in futures]

    def _remaining_s(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())


def _waits_of_this_thread() -> int:
    """How often it has given up its core of itself: to wait for storage, or for Python's lock."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


def _late(num_left: int, num_all: int) -> StorageError:
    return StorageError(
        f"{num_left} of {num_all} reads are not done within timeouts.load_s; raise it, or look at the storage"
    )
