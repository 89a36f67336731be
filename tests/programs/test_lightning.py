"""Lightning: what Fabric and the Trainer wrote, under FSDP1 and FSDP2, is loaded by others as it was in memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.programs.conftest import SaveWith
from tests.programs.launch import Launcher
from tests.programs.plain import load_into_plain
from tests.programs.whole_state import check_same

pytestmark = pytest.mark.slow

STRATEGIES = ("FSDPStrategy", "ModelParallelStrategy")


def test_on_3_ranks_of_fabric(launcher: Launcher, saved_with: SaveWith, tmp_path: Path) -> None:
    """Into the wrappers that Fabric hands out for the model and the optimizer."""
    saved = saved_with("fabric")
    check_same(launcher.load_with(saved, 3, directory=tmp_path), saved.whole_state)


def test_on_one_rank_without_fabric(saved_with: SaveWith) -> None:
    saved = saved_with("fabric")
    check_same(load_into_plain(saved.checkpoint, "optimizer"), saved.whole_state)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_on_3_ranks_of_the_trainer(launcher: Launcher, saved_with: SaveWith, tmp_path: Path, strategy: str) -> None:
    saved = saved_with("trainer", strategy)
    check_same(launcher.load_with(saved, 3, directory=tmp_path), saved.whole_state)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_on_one_rank_without_the_trainer(saved_with: SaveWith, strategy: str) -> None:
    saved = saved_with("trainer", strategy)
    expected = {fqn.removeprefix("net."): values for fqn, values in saved.whole_state.items()}
    check_same(load_into_plain(saved.checkpoint, "optimizer_0", rename={"net.*": "*"}), expected)


def test_the_trainer_resumes_through_our_function(launcher: Launcher, saved_with: SaveWith, tmp_path: Path) -> None:
    """``fit(ckpt_path=...)`` under FSDPStrategy calls torch's `load_sharded_optimizer_state_dict`; `shardferry.dcp` has it too."""
    saved = saved_with("trainer", "FSDPStrategy")
    check_same(launcher.load_with(saved, 3, directory=tmp_path, action="resume"), saved.whole_state)
