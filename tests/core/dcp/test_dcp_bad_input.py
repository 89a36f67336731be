"""`shardferry.dcp` with wrong arguments and broken readers: one clear error on every rank, and nobody waits."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner

import shardferry.dcp as ours
from shardferry.errors import ShardferryError, SpecError
from tests.support.ranks import RankPool
from tests.support.sharded import sharded

Outcome = tuple[str, str]  # the error's type and message


def load(path: str, **changes: Any) -> Outcome:
    """What a load raises that is right but for some arguments."""
    arguments: dict[str, Any] = {
        "model_state_dict": {},
        "optimizer_key": "optim",
        "storage_reader": FileSystemReader(path),
        "planner": None,
    }
    try:
        ours.load_sharded_optimizer_state_dict(**{**arguments, **changes})
    except ShardferryError as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def load_changed(path: str, change: Callable[[int], dict[str, Any]]) -> Outcome:
    return load(path, **change(dist.get_rank()))


def wrong_model(rank: int) -> dict[str, Any]:
    return {"model_state_dict": torch.nn.Linear(2, 2)}


def wrong_key(rank: int) -> dict[str, Any]:
    return {"optimizer_key": 3}


def wrong_reader(rank: int) -> dict[str, Any]:
    return {"storage_reader": "checkpoints/step-1"}


def wrong_planner(rank: int) -> dict[str, Any]:
    return {"planner": DefaultLoadPlanner}


def wrong_group(rank: int) -> dict[str, Any]:
    return {"process_group": "world"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wrong_model, "model_state_dict: is a Linear, not a state dict"),
        (wrong_key, "optimizer_key: is a int, not a string"),
        (wrong_reader, "storage_reader: is a str, not a StorageReader"),
        (wrong_planner, "planner: is a type, not a LoadPlanner or None"),
        (wrong_group, "process_group: is a str, not a ProcessGroup"),
    ],
)
def test_wrong_types(ranks: RankPool, saved_by: dict[int, Path], change: Any, message: str) -> None:
    assert ranks.run(2, load_changed, str(saved_by[2]), change) == [("SpecError", message)] * 2


def wrong_reader_on_rank_1(rank: int) -> dict[str, Any]:
    return wrong_reader(rank) if rank == 1 else {}


def test_a_wrong_type_on_one_rank(ranks: RankPool, saved_by: dict[int, Path]) -> None:
    """The others hear of it instead of waiting."""
    (first, told), (second, own) = ranks.run(2, load_changed, str(saved_by[2]), wrong_reader_on_rank_1)
    assert (first, second) == ("RankError", "SpecError")
    assert "failed on rank 1: storage_reader: is a str" in told
    assert own == "storage_reader: is a str, not a StorageReader"


def another_key_on_rank_1(rank: int) -> dict[str, Any]:
    return {"optimizer_key": ("optim", "model")[rank]}


def a_planner_on_rank_1(rank: int) -> dict[str, Any]:
    return {"planner": OwnPlanner()} if rank == 1 else {}


class OwnPlanner(DefaultLoadPlanner):
    """Somebody's own."""


@pytest.mark.parametrize("change", [another_key_on_rank_1, a_planner_on_rank_1])
def test_ranks_that_disagree(ranks: RankPool, saved_by: dict[int, Path], change: Any) -> None:
    for kind, message in ranks.run(2, load_changed, str(saved_by[2]), change):
        assert kind == "SpecError"
        assert "rank 0 asks for 'optim' by FileSystemReader and NoneType, rank 1 for" in message


def load_with_a_group_of_others(path: str) -> Outcome:
    return load(path, process_group=dist.new_group([0, 1]))


def test_a_rank_outside_the_group(ranks: RankPool, saved_by: dict[int, Path]) -> None:
    members = ranks.run(3, load_with_a_group_of_others, str(saved_by[2]))
    assert [kind for kind, _ in members] == ["nothing", "nothing", "SpecError"]
    assert "rank 2 of the job is not in it" in members[2][1]


def test_without_a_process_group(saved_by: dict[int, Path]) -> None:
    kind, message = load(str(saved_by[1]))
    assert kind == "SpecError"
    assert "call torch.distributed.init_process_group first" in message
    with pytest.raises(SpecError, match="is not initialised"):
        ours.create_colwise_spec()


class ReaderWithoutMetadata(FileSystemReader):
    """Gives something else on rank 1."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return super().read_metadata() if dist.get_rank() == 0 else {"no": "metadata"}  # type: ignore[return-value]


class BrokenReader(FileSystemReader):
    """Fails on rank 1 while it reads."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Any:
        if dist.get_rank() == 1:
            raise RuntimeError("the disk is gone")
        return super().read_data(plan, planner)


class BrokenPlanner(DefaultLoadPlanner):
    """Fails on rank 1 while it plans."""

    def create_local_plan(self) -> LoadPlan:
        if dist.get_rank() == 1:
            raise KeyError("no plan")
        return super().create_local_plan()


def load_with(path: str, reader: type[FileSystemReader], planner: type[LoadPlanner] | None) -> Outcome:
    return load(path, storage_reader=reader(path), planner=planner() if planner else None)


@pytest.mark.conformance(19)
@pytest.mark.parametrize(
    ("reader", "planner", "message"),
    [
        (ReaderWithoutMetadata, None, "ReaderWithoutMetadata.read_metadata gave a dict, not a Metadata"),
        (BrokenReader, None, "loading failed on rank 1: RuntimeError: the disk is gone"),
        (FileSystemReader, BrokenPlanner, "loading failed on rank 1: KeyError: 'no plan'"),
    ],
)
def test_a_reader_or_planner_that_fails_on_one_rank(
    ranks: RankPool, saved_by: dict[int, Path], reader: Any, planner: Any, message: str
) -> None:
    outcomes = ranks.run(2, load_with, str(saved_by[2]), reader, planner)
    assert all(message in words for _, words in outcomes)
    assert outcomes[0][0] == "RankError"


class OwnReader(FileSystemReader):
    """Somebody's own."""


@pytest.mark.parametrize("reader", [FileSystemReader, OwnReader])
@pytest.mark.parametrize("there", [False, True], ids=["no-directory", "no-metadata"])
def test_no_checkpoint(ranks: RankPool, tmp_path: Path, reader: Any, there: bool) -> None:
    if there:
        (tmp_path / "ckpt").mkdir()
    for kind, message in ranks.run(2, load_with, str(tmp_path / "ckpt"), reader, None):
        assert kind in ("CheckpointNotFound", "RankError")
        assert str(tmp_path / "ckpt") in message


def load_outside(path: str, planner: Any) -> Outcome:
    """The model's own metadata is wrong: torch looked at it only when the tensor was made."""
    like = sharded((48, 6), {0: [((0, 0), (24, 6))], 1: [((24, 0), (24, 6))]})
    for shard in like.local_shards():
        shard.metadata.shard_offsets = [30, 0]
    return load(path, model_state_dict={"even.weight": like}, planner=planner() if planner else None)


@pytest.mark.parametrize("planner", [None, OwnPlanner])
def test_shards_outside_the_saved_tensor(ranks: RankPool, saved_by: dict[int, Path], planner: Any) -> None:
    for kind, message in ranks.run(2, load_outside, str(saved_by[2]), planner):
        assert kind == "LayoutError"
        assert "[30:54, 0:6] lies outside the saved shape (48, 6)" in message


def load_other_model(path: str, planner: Any) -> Outcome:
    return load(path, model_state_dict={"even.weight": torch.zeros(47, 6)}, planner=planner() if planner else None)


@pytest.mark.parametrize("planner", [None, OwnPlanner])
def test_another_models_checkpoint(ranks: RankPool, saved_by: dict[int, Path], planner: Any) -> None:
    """A moment always has its parameter's shape: it isn't taken for state of another shape, which comes whole."""
    for kind, message in ranks.run(2, load_other_model, str(saved_by[2]), planner):
        assert kind == "LayoutError"
        assert "saved with the shape (48, 6), but the model's even.weight has (47, 6)" in message


def test_no_traceback_is_lost(ranks: RankPool, saved_by: dict[int, Path]) -> None:
    """Whose fault it was stands in the error's cause, as torch gathered it."""
    (outcome, _) = ranks.run(2, cause_of, str(saved_by[2]))
    assert "BrokenReader" not in outcome
    assert "the disk is gone" in outcome
    assert "in read_data" in outcome


def cause_of(path: str) -> str:
    try:
        ours.load_sharded_optimizer_state_dict({}, "optim", BrokenReader(path))
    except ShardferryError as error:
        return "".join(traceback.format_exception(error.__cause__))
    return "nothing was raised"
