"""Tasks run once each, further tasks too; the first failure and the deadline stop all."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import pytest

from shardferry.errors import StorageError
from shardferry.read.threads import num_read_threads, run_tasks, usable_cores


@pytest.mark.parametrize("num_threads", [1, 4])
def test_every_task_runs_once_and_further_tasks_come_next(num_threads: int) -> None:
    done: list[int] = []

    def work(task: int) -> Sequence[int]:
        done.append(task)
        return (task * 10, task * 10 + 1) if task < 10 else ()

    run_tasks(work, range(1, 6), num_threads=num_threads, timeout_s=30)
    assert sorted(done) == sorted([*range(1, 6), *(10 * n + i for n in range(1, 6) for i in (0, 1))])
    if num_threads == 1:
        assert done[:3] == [1, 10, 11]


def test_no_task() -> None:
    run_tasks(lambda _: (), [], num_threads=4, timeout_s=1)


@pytest.mark.parametrize("num_threads", [1, 4])
def test_the_first_failure_stops_all(num_threads: int) -> None:
    begun: list[int] = []

    def work(task: int) -> Sequence[int]:
        begun.append(task)
        if task == 3:
            raise ZeroDivisionError(str(task))
        time.sleep(0.01)
        return ()

    with pytest.raises(ZeroDivisionError, match="3"):
        run_tasks(work, range(1000), num_threads=num_threads, timeout_s=30)
    assert len(begun) < 100


@pytest.mark.parametrize("num_threads", [1, 4])
def test_a_task_that_hangs_is_given_up_at_the_deadline(num_threads: int) -> None:
    released = threading.Event()
    start = time.monotonic()
    with pytest.raises(StorageError, match=r"\d+ of 9 reads are not done within timeouts\.load_s"):
        run_tasks(lambda _: (released.wait(60) and ()) or (), range(9), num_threads=num_threads, timeout_s=0.2)
    assert time.monotonic() - start < 10
    released.set()


def test_as_many_tasks_at_once_as_there_are_threads() -> None:
    together = threading.Barrier(4, timeout=30)
    run_tasks(lambda _: (together.wait() and ()) or (), range(8), num_threads=4, timeout_s=60)


def test_threads_of_local_files_share_the_nodes_cores() -> None:
    cores = usable_cores()
    assert num_read_threads(concurrency=16, is_local=False, ranks_on_node=8) == 16
    assert num_read_threads(concurrency=10_000, is_local=True, ranks_on_node=1) == cores
    assert num_read_threads(concurrency=16, is_local=True, ranks_on_node=10_000) == 1
    assert num_read_threads(concurrency=1, is_local=True, ranks_on_node=1) == 1


def test_further_tasks_get_threads_of_their_own() -> None:
    """One task that opens an item, and the four reads that follow it at once."""
    together = threading.Barrier(4, timeout=30)

    def work(task: str) -> Sequence[str]:
        if task == "open":
            return ["read"] * 4
        together.wait()
        return ()

    run_tasks(work, ["open"], num_threads=4, timeout_s=60)
