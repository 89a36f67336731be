"""torchrun on two processes, then on one, against a run that was not interrupted and wraps nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from examples import torchrun
from examples.task import make_optimizer, network, train_step
from tests.support.commands import run_process


def launch(num_processes: int, directory: Path, until: int) -> str:
    """What a job prints."""
    options = ["--standalone", f"--nproc-per-node={num_processes}", "-m", "examples.torchrun"]
    done = run_process(*options, directory, f"--until={until}", python=("-m", "torch.distributed.run"))
    assert done.status == 0, done.stderr
    return done.stdout


def losses(printed: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"^step \d+ loss (\S+)$", printed, re.MULTILINE)]


def test_resumes_on_another_number_of_processes(tmp_path: Path) -> None:
    (tmp_path / "step-9").mkdir()  # of a save that was cut off
    first = launch(2, tmp_path, until=3)
    assert "resumed" not in first
    second = launch(1, tmp_path, until=6)
    assert "resumed step-3, world size 1" in second

    model = network()
    optimizer = make_optimizer(model)
    uninterrupted = [train_step(model, optimizer, step) for step in range(6)]
    assert losses(first) + losses(second) == pytest.approx(uninterrupted, rel=1e-5)
    assert torchrun.newest_complete(tmp_path) == tmp_path / "step-6"
