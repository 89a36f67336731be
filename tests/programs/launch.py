"""Run a training program on several ranks: real processes, forked from one that has the programs' packages imported.

Importing Lightning takes longer than all the work of a rank, and leaves its marks on torch, so that the ranks of all other
tests are forked from another process (tests/support/ranks.py). The ranks get the environment that torchrun gives, and
meet over a file.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.programs.whole_state import WholeState, read_whole_state

_DEADLINE_S = 240.0
_PROGRAMS = ("accelerator", "fabric", "titan", "trainer")  # modules beside this one


@dataclass(frozen=True)
class Saved:
    """What a program saved, and what it held in memory when it did."""

    program: str
    options: tuple[str, ...]
    checkpoint: Path
    whole_state: WholeState


@dataclass(frozen=True)
class Run:
    """A program's function to be called on some ranks."""

    program: str
    action: str
    num_ranks: int
    arguments: tuple[str, ...]
    directory: Path  # of the ranks' logs and their rendezvous


class Launcher:
    """A process that has imported the programs, and forks ranks as it is told."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(10)

    def save_with(self, program: str, *options: str, directory: Path) -> Saved:
        """Let a program train on 2 ranks and save in its own way."""
        checkpoint, whole_state = directory / "checkpoint", directory / "whole_state.pt"
        self._run(Run(program, "save", 2, (str(checkpoint), str(whole_state), *options), directory))
        return Saved(program, options, checkpoint, read_whole_state(whole_state))

    def load_with(self, saved: Saved, num_ranks: int, *, directory: Path, action: str = "load") -> WholeState:
        """Let the program that saved load on other ranks, with Shardferry; what it then has in memory."""
        whole_state = directory / "whole_state.pt"
        arguments = (str(saved.checkpoint), str(whole_state), *saved.options)
        self._run(Run(saved.program, action, num_ranks, arguments, directory))
        return read_whole_state(whole_state)

    def _run(self, run: Run) -> None:
        self._pipe.send(run)
        outcomes: list[int | None] = self._pipe.recv()
        if any(outcomes) or None in outcomes:
            output = "".join(path.read_text() for path in sorted(run.directory.glob("rank-*.log")))
            pytest.fail(f"{run.program} {run.action}: its ranks ended with {outcomes}\n{output}", pytrace=False)


def _serve(pipe: Connection) -> None:
    for program in _PROGRAMS:
        import_module(f"tests.programs.{program}")
    while True:
        try:
            run = pipe.recv()
        except EOFError:
            return
        pipe.send(_outcomes(run))


def _outcomes(run: Run) -> list[int | None]:
    """Exit status by rank; None where a rank was still running at the deadline."""
    context = multiprocessing.get_context("fork")  # this process has imported packages, and started no thread
    ranks: list[BaseProcess] = []
    for rank in range(run.num_ranks):
        ranks.append(context.Process(target=_rank, args=(run, rank)))
        ranks[-1].start()
    try:
        deadline = time.monotonic() + _DEADLINE_S
        for process in ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in ranks]
    finally:
        for process in ranks:
            process.kill()


def _rank(run: Run, rank: int) -> None:
    _write_output_to(run.directory / f"rank-{rank}.log")
    torch.set_num_threads(1)
    num_ranks = run.num_ranks
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": f"{num_ranks}"}
    os.environ |= {"WORLD_SIZE": f"{num_ranks}", "TORCH_DIST_INIT_BARRIER": "1", "CUDA_VISIBLE_DEVICES": ""}
    store = dist.FileStore(f"{run.directory}/rendezvous-{run.action}", num_ranks)
    timeout = timedelta(seconds=_DEADLINE_S / 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timeout)
    try:
        getattr(import_module(f"tests.programs.{run.program}"), run.action)(*run.arguments)
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


def _write_output_to(path: Path) -> None:
    with path.open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
