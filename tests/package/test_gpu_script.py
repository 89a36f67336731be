"""scripts/gpu: what it says where there is no GPU, and that its tests need torch, NumPy and pytest alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import REPOSITORY

# What a bare machine doesn't have of the packages that our other tests and programs import.
_ABSENT = ("ray", "pydantic", "yaml", "rich", "typer", "hypothesis", "psutil", "obstore", "xdist", "safetensors")
_PROGRAM = f"""
import os, sys
for name in {_ABSENT!r}:
    sys.modules[name] = None
import pytest
status = pytest.main([*{{settings!r}}, "-q", "-rs", "tests/gpu"])
import tests.gpu.speed
sys.exit(status)
"""


@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="there is a GPU")
def test_a_machine_without_a_gpu() -> None:
    done = subprocess.run(
        [REPOSITORY / "scripts" / "gpu"],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("scripts/gpu: there is no GPU on this machine (no /dev/nvidia0")
    assert done.stderr.endswith("nothing was tested\n")


@pytest.mark.slow
def test_its_tests_need_no_other_package() -> None:
    settings = ["-c", os.devnull, "--rootdir", ".", "--noconftest", "-p", "no:cacheprovider"]
    settings += ["-o", "markers=gpu: needs a CUDA device"]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(settings=settings)],
        cwd=REPOSITORY,
        env={**environment, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SKIPPED" in done.stdout
    assert "this machine has no GPU" in done.stdout
