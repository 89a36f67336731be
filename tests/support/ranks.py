"""Real processes that form gloo process groups of any size up to the pool's, without ports."""

from __future__ import annotations

import gc
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import forking

DEADLINE_S = 240.0
_TIRED_THREADS = 80  # torch keeps some process groups for ever, whose threads spin once their peers are gone


class RankPool:
    """Processes that stay up between tests, so that the first calls of torch's functions are behind them."""

    def __init__(self, size: int, *, deadline_s: float = DEADLINE_S, context: BaseContext | None = None) -> None:
        self._context: Any = context or forking()
        self._deadline_s = deadline_s
        self._ranks: list[tuple[BaseProcess, Connection]] = []
        self._size = size
        self._directory = tempfile.TemporaryDirectory(prefix="shardferry-ranks-")
        self._runs = 0

    def run(self, world_size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
        """Call ``work(*args)`` on each rank of a fresh process group; results by rank.

        A failure on any rank raises here, with that rank's traceback.
        """
        outcomes = self.outcomes(world_size, work, *args)
        failures = [f"rank {rank}:\n{value}" for rank, (done, value) in enumerate(outcomes) if not done]
        if failures:
            pytest.fail("\n".join(failures), pytrace=False)
        return [value for _, value in outcomes]

    def outcomes(self, world_size: int, work: Callable[..., Any], *args: Any) -> list[tuple[bool, Any]]:
        """Like `run`, but gives ``(True, result)`` or ``(False, traceback)`` of each rank."""
        self._start(world_size)
        self._runs += 1
        rendezvous = Path(self._directory.name) / f"run-{self._runs}"
        members = self._ranks[:world_size]
        for rank, (_, pipe) in enumerate(members):
            pipe.send((work, args, rank, world_size, str(rendezvous)))
        results: list[tuple[bool, Any]] = []
        for rank, (process, pipe) in enumerate(members):
            wait([pipe, process.sentinel], timeout=self._deadline_s)
            try:
                results.append(_answer(pipe))
            except (EOFError, ConnectionError, TimeoutError):
                self._retire()  # the other ranks' answers, too, would be taken for those of the next run
                pytest.fail(f"rank {rank} of {world_size} died or hung in {work.__name__}", pytrace=False)
        if any(_num_threads(process) > _TIRED_THREADS for process, _ in members):
            self._retire()
        return results

    def close(self) -> None:
        self._retire()
        self._directory.cleanup()

    def _retire(self) -> None:
        """End the processes; the next run starts new ones."""
        for process, pipe in self._ranks:
            pipe.close()
            process.kill()  # it may hang
            process.join(10)
        self._ranks.clear()

    def _start(self, world_size: int) -> None:
        assert world_size <= self._size, f"the pool has {self._size} ranks"
        if not all(process.is_alive() for process, _ in self._ranks):  # one has died after its answer
            self._retire()
        while len(self._ranks) < world_size:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))


def _answer(pipe: Connection) -> tuple[bool, Any]:
    """What a rank has sent. Raises TimeoutError: it hangs; EOFError, ConnectionError: it has died."""
    if not pipe.poll(0):
        raise TimeoutError
    answer: tuple[bool, Any] = pipe.recv()
    return answer


def _num_threads(process: BaseProcess) -> int:
    return len(list(Path(f"/proc/{process.pid}/task").iterdir()))


def _serve(pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    gc.freeze()  # what was imported stays: else each collection below walks torch's heap for 0.2 s of CPU
    # Else a rank may be done, and its sockets closed, before a late one has connected to it.
    os.environ["TORCH_DIST_INIT_BARRIER"] = "1"
    while True:
        try:
            work, args, rank, world_size, rendezvous = pipe.recv()
        except EOFError:
            return
        try:
            store = dist.FileStore(rendezvous, world_size)
            dist.init_process_group(
                "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=DEADLINE_S / 2)
            )
            try:
                outcome = (True, work(*args))
            finally:
                dist.destroy_process_group()
                # Wrapped models are cycles that hold their process groups, whose threads spin once the peers are gone.
                gc.collect()
        except BaseException:
            outcome = (False, traceback.format_exc())
        pipe.send(outcome)
