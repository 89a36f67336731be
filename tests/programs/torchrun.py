"""Run a training program on several ranks as people do: under torchrun, whose agent picks a free port and holds it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.programs.whole_state import WholeState, read_whole_state
from tests.support.commands import REPOSITORY

_DEADLINE_S = 150.0


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
    _torchrun(program, 2, "save", checkpoint, whole_state, *options)
    return Saved(program, options, checkpoint, read_whole_state(whole_state))


def load_with(saved: Saved, num_ranks: int, *, directory: Path, action: str = "load") -> WholeState:
    """Let the program that saved load on other ranks, with Shardferry; what it then has in memory."""
    whole_state = directory / "loaded.pt"
    _torchrun(saved.program, num_ranks, action, saved.checkpoint, whole_state, *saved.options)
    return read_whole_state(whole_state)


def _torchrun(program: str, num_ranks: int, *arguments: str | Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=localhost"]
    command += [f"--nproc-per-node={num_ranks}", "-m", f"tests.programs.{program}", *map(str, arguments)]
    running = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = running.communicate(timeout=_DEADLINE_S)
    except subprocess.TimeoutExpired:
        running.send_signal(signal.SIGTERM)  # the agent ends its ranks
        output, _ = running.communicate()
        pytest.fail(f"{program} on {num_ranks} ranks took more than {_DEADLINE_S:g} s:\n{output}", pytrace=False)
    if running.returncode:
        pytest.fail(f"{program} on {num_ranks} ranks ended with {running.returncode}:\n{output}", pytrace=False)
