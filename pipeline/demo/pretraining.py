"""The demo's first half: train on several processes and save a checkpoint, without Ray."""

from __future__ import annotations

import multiprocessing
import tempfile
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import monotonic

import torch.distributed as dist

from shardferry.errors import RankError
from shardferry.pipeline.demo.training import build, save, train

# Imported once, for all processes; torch imports the second with its first optimizer.
_PRELOADED = ["shardferry.pipeline.demo.training", "torch._dynamo"]


def pretrain(path: Path, *, world_size: int, num_steps: int, timeout_s: float = 120.0) -> list[float]:
    """Train on ``world_size`` processes and save to ``path``.

    Returns:
        The loss of each step.

    Raises:
        RankError: a process failed, or was not done within ``timeout_s``. All processes have ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory() as directory:
        started: list[tuple[BaseProcess, Connection]] = []
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe(duplex=False)
                arguments = (theirs, rank, world_size, f"{directory}/rendezvous", path, num_steps)
                process: BaseProcess = context.Process(target=_rank, args=arguments, daemon=True)
                process.start()
                theirs.close()
                started.append((process, ours))
            return _collect(started, monotonic() + timeout_s)[0]
        finally:
            for process, pipe in started:
                process.terminate()
                process.join()
                pipe.close()


def _collect(started: list[tuple[BaseProcess, Connection]], deadline: float) -> list[list[float]]:
    """The losses of all processes, by rank. Raises RankError: a process failed, or was not done before the deadline."""
    results: list[list[float]] = []
    for rank, (_, pipe) in enumerate(started):
        if not pipe.poll(max(0.0, deadline - monotonic())):
            raise RankError(f"training: rank {rank} of {len(started)} is not done in time", [rank])
        try:
            results.append(pipe.recv())
        except EOFError:
            message = f"training: the process of rank {rank} failed; its traceback is above"
            raise RankError(message, [rank]) from None
    return results


def _rank(pipe: Connection, world_rank: int, world_size: int, rendezvous: str, path: Path, num_steps: int) -> None:
    store = dist.FileStore(rendezvous, world_size)
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=world_rank, world_size=world_size, timeout=timeout)
    model, optimizer = build()
    losses = train(model, optimizer, range(num_steps))
    save(model, optimizer, path)
    pipe.send(losses)
    dist.destroy_process_group()
