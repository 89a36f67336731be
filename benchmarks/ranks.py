"""Real processes that form gloo process groups of any size up to the pool's, without ports."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

_DEADLINE_S = 1800.0  # for one call on all ranks
_COLLECTIVE_S = 600.0
_PRELOADED = ["benchmarks.run", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp"]


class RankFailed(RuntimeError):
    """A rank raised, died or hung."""


class RankPool:
    """Processes that stay up from case to case, so that imports and first calls are behind them.

    They are forked from one that has imported everything, and share its pages.
    """

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOADED)
        self._directory = tempfile.TemporaryDirectory(prefix="shardferry-ranks-")
        self._calls = 0
        self._ranks: list[tuple[BaseProcess, Connection]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process, pipe in self._ranks:
            pipe.close()
            process.terminate()
            process.join(10)
        self._directory.cleanup()

    def run(self, world_size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
        """Call ``work(*args)`` on each rank of a fresh process group; results by rank.

        Raises:
            RankFailed: with the traceback of each rank that failed.
        """
        while len(self._ranks) < world_size:
            self._ranks.append(self._start())
        self._calls += 1
        rendezvous = str(Path(self._directory.name, f"call-{self._calls}"))
        members = self._ranks[:world_size]
        for world_rank, (_, pipe) in enumerate(members):
            pipe.send((work, args, world_rank, world_size, rendezvous))
        outcomes: list[tuple[bool, Any]] = []
        for world_rank, (process, pipe) in enumerate(members):
            if not wait([pipe, process.sentinel], timeout=_DEADLINE_S) or not pipe.poll(0):
                raise RankFailed(f"rank {world_rank} of {world_size} died or hung in {getattr(work, '__name__', work)}")
            outcomes.append(pipe.recv())
        failures = [f"rank {world_rank}:\n{value}" for world_rank, (done, value) in enumerate(outcomes) if not done]
        if failures:
            raise RankFailed("\n".join(failures))
        return [value for _, value in outcomes]

    def _start(self) -> tuple[BaseProcess, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs,))  # no daemon: bytecheckpoint starts one
        process.start()
        theirs.close()
        return process, ours


def _serve(pipe: Connection) -> None:
    warnings.simplefilter("ignore")  # torch warns of its own deprecated functions, on each rank and each round
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)  # as torchrun does where a node has several ranks
    while True:
        try:
            work, args, world_rank, world_size, rendezvous = pipe.recv()
        except EOFError:
            return
        try:
            store = dist.FileStore(rendezvous, world_size)
            timeout = timedelta(seconds=_COLLECTIVE_S)
            dist.init_process_group("gloo", store=store, rank=world_rank, world_size=world_size, timeout=timeout)
            try:
                outcome = (True, work(*args))
            finally:
                dist.destroy_process_group()
        except BaseException:
            outcome = (False, traceback.format_exc())
        pipe.send(outcome)
