"""What the README shows, runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

from schemas import StageConfig
from tests.support.commands import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    """The first block of a language."""
    found = re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_twelve_lines_print_what_they_say(tmp_path: Path) -> None:
    code = block("python")
    said = re.search(r"print\(.*\)\s+# (.*)$", code, re.MULTILINE)
    assert said is not None
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == said[1]


def test_the_spec_is_one() -> None:
    StageConfig.model_validate(yaml.safe_load(block("yaml")))


def test_no_number_is_missing() -> None:
    assert "@@" not in README
