"""Hugging Face accelerate, FSDP2: what `Accelerator.save_state` wrote is loaded by others as it was in memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.programs.conftest import SaveWith
from tests.programs.launch import Launcher
from tests.programs.plain import load_into_plain
from tests.programs.whole_state import check_same

pytestmark = pytest.mark.slow


def test_on_3_ranks_of_accelerate(launcher: Launcher, saved_with: SaveWith, tmp_path: Path) -> None:
    """Into the wrapper that accelerate hands out for the optimizer."""
    saved = saved_with("accelerator")
    check_same(launcher.load_with(saved, 3, directory=tmp_path), saved.whole_state)


def test_on_one_rank_without_accelerate(saved_with: SaveWith) -> None:
    saved = saved_with("accelerator")
    check_same(load_into_plain(saved.checkpoint / "optimizer_0", "optimizer"), saved.whole_state)
