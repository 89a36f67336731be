"""Torchtitan: what its CheckpointManager wrote is loaded by others as it was in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.programs.conftest import SaveWith
from tests.programs.launch import Launcher
from tests.programs.plain import load_into_plain
from tests.programs.whole_state import check_same

pytestmark = pytest.mark.slow


def test_on_3_ranks_of_torchtitan(launcher: Launcher, saved_with: SaveWith, tmp_path: Path) -> None:
    """Into the container, whose two optimizers were saved as one."""
    saved = saved_with("titan")
    check_same(launcher.load_with(saved, 3, directory=tmp_path), saved.whole_state)


def test_on_one_rank_without_torchtitan(saved_with: SaveWith) -> None:
    """Into one Adam: what makes a group AdamW's is one of its hyperparameters."""
    saved = saved_with("titan")
    loaded = load_into_plain(saved.checkpoint / "step-3", "optimizer", optimizer_class=torch.optim.Adam)
    check_same(loaded, saved.whole_state)
