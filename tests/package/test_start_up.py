"""What is imported when: help waits for nothing large, looking at a checkpoint doesn't wait for Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import shardferry
from tests.support.commands import REPOSITORY

HEAVY = ("torch", "ray", "numpy", "rich", "yaml")  # typer itself asks for pydantic
COMMANDS = ("inspect", "init", "diff", "plan", "run", "report", "verify", "kept", "demo")

# Runs commands in one process, one after the other; then says how each ended, and what is imported after each.
PROGRAM = """
import contextlib, io, json, sys

def imported():
    return sorted({name.partition(".")[0] for name in sys.modules})

import shardferry, shardferry.pipeline, shardferry.schemas, shardferry.actors

found = {"import": [0, "", imported()]}
from shardferry.pipeline.cli import main
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = main(words)
    found[" ".join(words)] = [status, out.getvalue(), imported()]
print(json.dumps(found))
"""


def run(*commands: list[str]) -> dict[str, tuple[int, str, set[str]]]:
    """By command: its exit status, what it printed, and which of the heavy packages are imported after it."""
    arguments = [sys.executable, "-c", PROGRAM, json.dumps(commands)]
    done = subprocess.run(arguments, cwd=REPOSITORY, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return {words: (status, out, {*names} & {*HEAVY}) for words, (status, out, names) in found.items()}


def test_help_imports_nothing_large() -> None:
    found = run(["--help"], ["--version"], *([command, "--help"] for command in COMMANDS))
    assert found.pop("import") == (0, "", set())
    assert found["--version"][1] == f"shardferry {shardferry.__version__}\n"
    for words, (status, out, heavy) in found.items():
        assert status == 0, words
        assert not heavy, words
        assert "Usage: " in out or words == "--version"
        assert "Examples:" in out or not words.endswith(" --help")


def test_inspect_plan_and_verify_do_not_import_ray(tmp_path: Path) -> None:
    """With --json not rich either."""
    checkpoint = str(tmp_path / "checkpoint")
    model = torch.nn.Linear(6, 10)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"optim": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=checkpoint, no_dist=True)
    spec = {
        "checkpoint": {"location": checkpoint},
        "topology": {"mesh": {"dp": 2}, "default": {"dp": "Shard(0)"}},
    }
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(spec))
    plan = ["plan", str(tmp_path / "stage.yaml")]
    commands = [["inspect", checkpoint], plan, ["verify", checkpoint]]
    found = run(*([*words, "--json"] for words in commands), *commands[:2])
    for words, (status, _, heavy) in found.items():
        assert status == 0, words
        assert "ray" not in heavy, words
        if words.endswith("--json"):
            assert "rich" not in heavy, words
    assert "torch" in found[" ".join([*plan, "--json"])][2], "else nothing was shown"
    assert "rich" in found[" ".join(plan)][2]


def cpu_s(*command: str) -> float:
    """Seconds of CPU that a command takes, the kernel's included."""
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_takes_little_cpu(option: str) -> None:
    """0.2 s on a quiet machine; 3.3 s when it imported torch and Ray."""
    assert cpu_s(sys.executable, "-m", "shardferry", option) < 1.0
