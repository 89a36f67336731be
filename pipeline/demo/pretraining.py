"""The demo's first half: train on several real processes and save, without Ray."""

from __future__ import annotations

import multiprocessing
import tempfile
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import monotonic

import torch.distributed as dist

from pipeline.demo.training import build, save, train
from shardferry.errors import RankError


def pretrain(path: Path, *, world_size: int, num_steps: int, timeout_s: float = 120.0) -> list[float]:
    """Train on ``world_size`` processes, save to ``path``; returns the losses.

    Raises:
        RankError: a process failed or was late; none is left running.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        started: list[tuple[BaseProcess, Connection]] = []
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe(duplex=False)
                arguments = (theirs, rank, world_size, f"{directory}/rendezvous", path, num_steps)
                process = context.Process(target=_rank, args=arguments, daemon=True)
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
    """Every process's losses, by rank; the first that ends without any is an error."""
    results: dict[int, list[float]] = {}
    while len(results) < len(started):
        open_pipes = {pipe: rank for rank, (_, pipe) in enumerate(started) if rank not in results}
        ready = wait(list(open_pipes), timeout=max(0.0, deadline - monotonic()))
        if not ready:
            raise RankError(
                f"training: ranks {sorted(open_pipes.values())} are not done in time", sorted(open_pipes.values())
            )
        for pipe in ready:
            rank = open_pipes[pipe]  # type: ignore[index]
            try:
                results[rank] = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                raise RankError(
                    f"training: the process of rank {rank} failed; its traceback stands above", [rank]
                ) from None
    return [results[rank] for rank in range(len(started))]


def _rank(pipe: Connection, world_rank: int, world_size: int, rendezvous: str, path: Path, num_steps: int) -> None:
    store = dist.FileStore(rendezvous, world_size)
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=world_rank, world_size=world_size, timeout=timeout)
    model, optimizer = build()
    losses = train(model, optimizer, range(num_steps))
    save(model, optimizer, path)
    pipe.send(losses)
    dist.destroy_process_group()
