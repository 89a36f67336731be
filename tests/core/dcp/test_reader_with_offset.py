"""`shardferry.dcp.ReaderWithOffset`: reads at an offset inside the saved tensor, and checks what torch doesn't."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, _version
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard as Cut
from torch.distributed.tensor import distribute_tensor

import shardferry.dcp as ours
from shardferry.dcp.sharded_tensors import region_of
from shardferry.errors import PlanError
from shardferry.read.objects import ForeignClass
from tests.support.alone import save_alone
from tests.support.damage import hole
from tests.support.oracle import full_tensor
from tests.support.ranks import RankPool
from tests.support.sharded import chunked, cut, sharded

KEY = "optim.state.even.weight.exp_avg"
EVEN = full_tensor("even.weight", "exp_avg", (48, 6))


def load_shifted(path: str) -> int:
    """Each of two tensor-parallel halves of 24 rows, cut again over its own data-parallel group of two (B2)."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    half, group = rank % 2, groups[rank % 2]
    spec = ours.create_colwise_spec(group)
    assert [placement.rank() for placement in spec.placements] == dist.get_process_group_ranks(group)
    value, key = chunked((24, 6), group), KEY
    dcp.load({key: value}, storage_reader=FileSystemReader(path), planner=ours.ReaderWithOffset({key: (24 * half, 0)}))
    (shard,) = value.local_shards()
    start = 24 * half + shard.metadata.shard_offsets[0]
    assert torch.equal(shard.tensor, EVEN[start : start + 12])
    return start


def test_reader_with_offset_in_groups_that_do_not_lead(ranks: RankPool, saved_by: dict[int, Path]) -> None:
    assert sorted(ranks.run(4, load_shifted, str(saved_by[3]))) == [0, 12, 24, 36]


def load_everything_at_once(path: str) -> None:
    """Several shards at an offset, none on one rank; beside them a DTensor, a plain tensor, an object."""
    boxes = {0: [((0, 0), (4, 6)), ((20, 0), (4, 3))], 1: [((4, 0), (16, 6)), ((20, 3), (4, 3))], 2: []}
    value = sharded((24, 6), boxes)
    mesh = init_device_mesh("cpu", (3,))
    state_dict = {
        KEY: value,
        "optim.state.thirty.weight.exp_avg": distribute_tensor(torch.zeros(30, 4), mesh, [Cut(0)]),
        "optim.state.five.weight.exp_avg": torch.zeros(5, 3),
        "optim.param_groups.0.lr": 9.0,
    }
    planner = ours.ReaderWithOffset({KEY: (24, 0)})
    dcp.load(state_dict, storage_reader=FileSystemReader(path), planner=planner)
    for shard in value.local_shards():
        assert torch.equal(shard.tensor, cut(EVEN, region_of(shard.metadata, (24, 0))))
    thirty = state_dict["optim.state.thirty.weight.exp_avg"].full_tensor()
    assert torch.equal(thirty, full_tensor("thirty.weight", "exp_avg", (30, 4)))
    five = state_dict["optim.state.five.weight.exp_avg"]
    assert torch.equal(five, full_tensor("five.weight", "exp_avg", (5, 3)))
    assert state_dict["optim.param_groups.0.lr"] == 0.125


def test_everything_at_once(ranks: RankPool, saved_by: dict[int, Path]) -> None:
    ranks.run(3, load_everything_at_once, str(saved_by[4]))


@pytest.fixture
def job(tmp_path: Path) -> Any:
    """A process group of this process alone."""
    store = dist.FileStore(str(tmp_path / "rendezvous"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def plan(path: Path, state_dict: dict[str, Any], offsets: dict[str, Any] | None = None, **options: Any) -> int:
    planner = ours.ReaderWithOffset(offsets or {}, **options)
    planner.set_up_planner(state_dict, FileSystemReader(path).read_metadata(), is_coordinator=True)
    return len(planner.create_local_plan().items)


def save_even(path: Path) -> Path:
    save_alone({"optim": {"state": {"even.weight": {"exp_avg": EVEN, "count": 5}}}}, path)
    return path


@pytest.mark.parametrize(
    ("shape", "offset", "message"),
    [
        ((24, 6), (25, 0), r"\[25:49, 0:6\] lies outside the saved shape \(48, 6\)"),
        ((24, 6), (-1, 0), r"\[-1:23, 0:6\] lies outside the saved shape \(48, 6\)"),
        ((24,), (0,), r"size mismatch: \(48, 6\) is saved, \(24,\) at \(0,\) is wanted"),
        ((24, 6), (24,), r"size mismatch: \(48, 6\) is saved, \(24, 6\) at \(24,\) is wanted"),
    ],
)
@pytest.mark.filterwarnings("ignore:Please use DTensor instead:FutureWarning")
def test_places_that_do_not_fit(job: None, tmp_path: Path, shape: Any, offset: Any, message: str) -> None:
    value = sharded(shape, {0: [((0,) * len(shape), shape)]})
    with pytest.raises(PlanError, match=message):
        plan(save_even(tmp_path / "ckpt"), {KEY: value}, {KEY: offset})


def test_kinds_that_do_not_fit(tmp_path: Path) -> None:
    save_even(tmp_path / "ckpt")
    with pytest.raises(PlanError, match="is wanted as a int, but was saved as a tensor"):
        plan(tmp_path / "ckpt", {KEY: 5})
    assert (
        plan(tmp_path / "ckpt", {KEY.replace("exp_avg", "count"): torch.zeros(3)}) == 1
    )  # it is replaced, as torch does


@pytest.mark.filterwarnings("ignore:Please use DTensor instead:FutureWarning")
def test_holes(job: None, saved_by: dict[int, Path], tmp_path: Path) -> None:
    shutil.copytree(saved_by[2], tmp_path / "ckpt")
    hole(tmp_path / "ckpt")
    half = sharded((24, 6), {0: [((0, 0), (24, 6))]})
    for state_dict, offsets in (({KEY: torch.zeros(48, 6)}, {}), ({KEY: half}, {KEY: (24, 0)})):
        with pytest.raises(
            PlanError, match=r"144 of \d+ wanted elements are in no saved chunk, first at \[24:48, 0:6\]"
        ):
            plan(tmp_path / "ckpt", state_dict, offsets)
    assert plan(tmp_path / "ckpt", {KEY: half}, {KEY: (0, 0)}) == 1


def save_as_torch_2_3_did(state_dict: dict[str, Any], path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists without tensors are one object."""
    with monkeypatch.context() as patch:
        patch.setattr(_version, "_derived_version", "2_3")
        save_alone(state_dict, path)
    assert "optim.param_groups" in FileSystemReader(path).read_metadata().state_dict_metadata


@pytest.mark.parametrize("planner", [DefaultLoadPlanner(), ours.ReaderWithOffset({})], ids=["stock", "ours"])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_checkpoints_of_torch_2_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planner: DefaultLoadPlanner) -> None:
    """Handled as torch's default planner handles them."""

    def state_dict(tensor: torch.Tensor, lr: float) -> dict[str, Any]:
        return {"optim": {"state": {"even.weight": {"exp_avg": tensor}}, "param_groups": [{"lr": lr}, {"lr": lr / 2}]}}

    save_as_torch_2_3_did(state_dict(EVEN, 0.5), tmp_path / "ckpt", monkeypatch)
    found = state_dict(torch.zeros(48, 6), 9.0)
    dcp.load(found, checkpoint_id=str(tmp_path / "ckpt"), planner=planner)
    assert torch.equal(found["optim"]["state"]["even.weight"]["exp_avg"], EVEN)
    assert found["optim"]["param_groups"] == [{"lr": 0.5}, {"lr": 0.25}]
    assert _version._derived_version is None


class Command:
    """Runs when a careless reader opens it."""

    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('executed')",)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path) -> None:
    """Torch's planner opens saved objects with ``weights_only=False``."""
    save_alone({"count": Command()}, tmp_path / "ckpt")
    with pytest.raises(dcp.api.CheckpointException, match=ForeignClass.__name__):
        dcp.load({"count": 0}, checkpoint_id=str(tmp_path / "ckpt"), planner=ours.ReaderWithOffset({}))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_objects_without_flattening(tmp_path: Path) -> None:
    save_alone({"lr": 0.5}, tmp_path / "ckpt")
    found = {"lr": 9.0}
    planner = ours.ReaderWithOffset({}, flatten_state_dict=False)
    dcp.load(found, checkpoint_id=str(tmp_path / "ckpt"), planner=planner)
    assert found == {"lr": 0.5}
