"""Run a training program on several ranks: real processes, forked from one that has the programs' packages imported.

Importing Lightning takes longer than all the work of a rank. The ranks get the environment that torchrun gives, and meet
over a file.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.programs.whole_state import WholeState, read_whole_state

_DEADLINE_S = 120.0
_PROGRAMS = ("accelerator", "fabric", "titan", "trainer")  # modules beside this one

_fork = multiprocessing.get_context("forkserver")
_fork.set_forkserver_preload([f"tests.programs.{program}" for program in _PROGRAMS])


@dataclass(frozen=True)
class Saved:
    """What a program saved, and what it held in memory when it did."""

    program: str
    options: tuple[str, ...]
    checkpoint: Path
    whole_state: WholeState


def save_with(program: str, *options: str, directory: Path) -> Saved:
    """Let a program train on 2 ranks and save in its own way."""
    checkpoint, whole_state = directory / "checkpoint", directory / "whole_state.pt"
    _run(program, "save", 2, (str(checkpoint), str(whole_state), *options), directory)
    return Saved(program, options, checkpoint, read_whole_state(whole_state))


def load_with(saved: Saved, num_ranks: int, *, directory: Path, action: str = "load") -> WholeState:
    """Let the program that saved load on other ranks, with Shardferry; what it then has in memory."""
    whole_state = directory / "whole_state.pt"
    arguments = (str(saved.checkpoint), str(whole_state), *saved.options)
    _run(saved.program, action, num_ranks, arguments, directory)
    return read_whole_state(whole_state)


def _run(program: str, action: str, num_ranks: int, arguments: tuple[str, ...], directory: Path) -> None:
    ranks: list[BaseProcess] = []
    for rank in range(num_ranks):
        ranks.append(_fork.Process(target=_rank, args=(program, action, rank, num_ranks, arguments, str(directory))))
        ranks[-1].start()
    try:
        for rank in ranks:
            rank.join(_DEADLINE_S)
        outcomes = [rank.exitcode for rank in ranks]  # None: still running
    finally:
        for rank in ranks:
            rank.kill()
    if any(outcomes) or None in outcomes:
        output = "".join(path.read_text() for path in sorted(directory.glob("rank-*.log")))
        pytest.fail(f"{program} {action}: its ranks ended with {outcomes}\n{output}", pytrace=False)


def _rank(program: str, action: str, rank: int, num_ranks: int, arguments: tuple[str, ...], directory: str) -> None:
    _write_output_to(Path(directory) / f"rank-{rank}.log")
    torch.set_num_threads(1)
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": f"{num_ranks}"}
    os.environ |= {"WORLD_SIZE": f"{num_ranks}", "TORCH_DIST_INIT_BARRIER": "1", "CUDA_VISIBLE_DEVICES": ""}
    store = dist.FileStore(f"{directory}/rendezvous-{action}", num_ranks)
    timeout = timedelta(seconds=_DEADLINE_S / 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timeout)
    try:
        getattr(import_module(f"tests.programs.{program}"), action)(*arguments)
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


def _write_output_to(path: Path) -> None:
    with path.open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
