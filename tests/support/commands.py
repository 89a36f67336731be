"""Run the command line: in this process, or as people do, in a process of its own with a deadline."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    status: int
    stdout: str
    stderr: str


def without_numbers(text: str) -> str:
    """Text in which one run of a command is like another: no numbers, and one space between words."""
    return re.sub(r"\d+(\.\d+)?", "#", " ".join(text.split()))


Command = Callable[..., Finished]  # called with the arguments; tests/pipeline/conftest.py makes one


def run_process(
    *arguments: str | Path, python: tuple[str, ...] = ("-m", "pipeline"), timeout_s: float = 300
) -> Finished:
    """``python -m pipeline ...``, or another program."""
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, *python, *map(str, arguments)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=timeout_s)
    return Finished(done.returncode, done.stdout, done.stderr)
