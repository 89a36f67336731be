"""Run many tasks on the threads of one rank; a task may give further tasks. The first failure stops all."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from shardferry.errors import StorageError

T = TypeVar("T")


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def num_read_threads(*, concurrency: int, is_local: bool, ranks_on_node: int) -> int:
    """How many threads one rank reads with.

    From local files a read is mostly a copy out of the page cache, so more threads than cores only get in each other's way (on 2
    cores, 16 threads take 1.3 times the CPU of one). Elsewhere a read waits for the network: as many as may be in flight.
    """
    return min(concurrency, max(1, usable_cores() // ranks_on_node)) if is_local else concurrency


def run_tasks(
    work: Callable[[T], Iterable[T]], tasks: Iterable[T], *, num_threads: int, timeout_s: float | None
) -> None:
    """Call ``work`` with each task, and with each task that it returns.

    Args:
        work: returns further tasks, which come next.
        num_threads: at most; there are never more than tasks.
        timeout_s: for all of them.

    Raises:
        StorageError: not done in time; a thread that hangs in a request is left behind.
        Exception: the first that ``work`` raised, once the other threads have finished their tasks.
    """
    # Never on the caller's thread: a read that hangs could not be given up.
    _TaskQueue(work, tasks, max_threads=num_threads, timeout_s=timeout_s).run()


class _TaskQueue(Generic[T]):
    """Tasks that wait, and the threads that run some."""

    def __init__(
        self, work: Callable[[T], Iterable[T]], tasks: Iterable[T], *, max_threads: int, timeout_s: float | None
    ) -> None:
        self._work = work
        self._waiting = deque(tasks)
        self._max_threads = max_threads
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._failure: BaseException | None = None
        self._num_threads = self._num_running = self._num_done = 0
        lock = threading.RLock()
        self._changed = threading.Condition(lock)  # for the threads: tasks have come, or none will
        self._ended = threading.Condition(lock)  # for the caller, who would otherwise be woken by every task

    def run(self) -> None:
        with self._ended:
            self._start_threads()
            remaining_s = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
            if not self._ended.wait_for(lambda: not self._num_threads, remaining_s):
                self._failure = self._failure or self._late()
                self._changed.notify_all()
            if self._failure is not None:
                raise self._failure

    def _start_threads(self) -> None:
        """As many as there are tasks for; called with the lock held."""
        while self._num_threads < min(self._max_threads, self._num_running + len(self._waiting)):
            self._num_threads += 1
            threading.Thread(target=self._serve, daemon=True, name=f"shardferry-read-{self._num_threads}").start()

    def _serve(self) -> None:
        try:
            while (task := self._take()) is not None:
                self._finish(self._work(task))
        except BaseException as error:
            with self._changed:
                self._failure = self._failure or error  # no further task begins
        finally:
            with self._changed:
                self._num_threads -= 1
                self._changed.notify_all()
                self._ended.notify_all()

    def _take(self) -> T | None:
        """The next task; None where none is left. Waits while running tasks may still give some."""
        with self._changed:
            while not self._waiting and self._num_running and self._failure is None:
                self._changed.wait()
            if not self._waiting or self._failure is not None:
                return None
            if self._deadline is not None and time.monotonic() > self._deadline:
                raise self._late()
            self._num_running += 1
            return self._waiting.popleft()

    def _finish(self, further: Iterable[T]) -> None:
        with self._changed:
            self._num_running -= 1
            self._num_done += 1
            num_before = len(self._waiting)
            self._waiting.extendleft(reversed(list(further)))
            if len(self._waiting) > num_before:
                self._start_threads()
            if len(self._waiting) > num_before or not self._num_running:
                self._changed.notify_all()

    def _late(self) -> StorageError:
        num_left = len(self._waiting) + self._num_running
        return StorageError(
            f"{num_left} of {self._num_done + num_left} reads are not done within timeouts.load_s; raise it, or look at the storage"
        )
