"""A fault on any rank, in any phase: every rank raises, says which rank it was, and has changed nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import shardferry
from tests.support.models import Model, adamw, fsdp2
from tests.support.networks import OTHERS
from tests.support.ranks import RankPool

NUM_RANKS = 3


def train_a_stranger(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The layout can't be read."""
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})


def train_what_was_not_saved(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """There is no plan."""
    model.register_parameter("unknown", nn.Parameter(torch.ones(3)))
    optimizer.add_param_group({"params": [model.unknown]})


def join_the_groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """There are no hyperparameters that fit."""
    matrices, others = optimizer.param_groups
    matrices["params"] += others["params"]
    del optimizer.param_groups[1]


FAULTS: dict[str, tuple[Callable[[nn.Module, torch.optim.Optimizer], None], str]] = {
    "layout": (train_a_stranger, "is not a parameter of the model"),
    "planning": (train_what_was_not_saved, "unknown"),
    "installing": (join_the_groups, "one live param group joins saved groups that differ in"),
}


def load_with(path: str, fault: str | None, failing: int) -> tuple[str, str]:
    """What this rank raises."""
    model = fsdp2(Model())
    optimizer = adamw(model, OTHERS)
    if fault is not None and dist.get_rank() == failing:
        FAULTS[fault][0](model, optimizer)
    try:
        shardferry.load_optimizer_state(model, optimizer, path)
    except shardferry.ShardferryError as error:
        assert not optimizer.state
        assert optimizer.param_groups[0]["lr"] == OTHERS[0]["lr"]
        return type(error).__name__, str(error)
    return "", ""


@pytest.mark.conformance(19)
@pytest.mark.parametrize("failing", range(NUM_RANKS))
@pytest.mark.parametrize("fault", FAULTS)
def test_a_rank_that_differs(ranks: RankPool, saved_by: dict[int, Path], fault: str, failing: int) -> None:
    raised = ranks.run(NUM_RANKS, load_with, str(saved_by[NUM_RANKS]), fault, failing)
    for rank, (kind, message) in enumerate(raised):
        assert FAULTS[fault][1] in message
        assert (kind == "RankError") == (rank != failing)
        assert rank == failing or f"rank {failing}" in message


@pytest.mark.conformance(19)
@pytest.mark.parametrize("failing", range(NUM_RANKS))
def test_a_file_that_one_rank_needs_is_gone(
    ranks: RankPool, saved_by: dict[int, Path], tmp_path: Path, failing: int
) -> None:
    """Saved and loaded on the same ranks, each rank reads what it needs from its own file; what all need, one reads."""
    path = shutil.copytree(saved_by[NUM_RANKS], tmp_path / "ckpt")
    gone = f"__{failing}_0.distcp"
    (path / gone).unlink()
    raised = ranks.run(NUM_RANKS, load_with, str(path), None, failing)
    assert all(gone in message for _, message in raised)
    assert {kind for kind, _ in raised} - {"RankError"}, "somebody saw it"


@pytest.mark.conformance(19)
def test_no_checkpoint(ranks: RankPool, tmp_path: Path) -> None:
    """Rank 0 alone looks for the directory, and all ranks raise what it found."""
    raised = ranks.run(NUM_RANKS, load_with, str(tmp_path / "ckpt"), None, 0)
    assert all(str(tmp_path / "ckpt") in message for _, message in raised)
    assert [kind for kind, _ in raised] == ["CheckpointNotFound"] * NUM_RANKS


@pytest.mark.conformance(19)
def test_a_directory_without_metadata(ranks: RankPool, tmp_path: Path) -> None:
    """Rank 0 alone looks into it, and all ranks raise what it found."""
    raised = ranks.run(NUM_RANKS, load_with, str(tmp_path), None, 0)
    assert all(f"{tmp_path}: no .metadata file" in message for _, message in raised)
    assert [kind for kind, _ in raised] == ["CheckpointNotFound"] * NUM_RANKS
