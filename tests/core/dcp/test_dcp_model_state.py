"""`shardferry.dcp`: model state of every kind says how the optimizer's state lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor import Shard as Cut

import shardferry.dcp as ours
from shardferry.dcp.sharded_tensors import region_of
from tests.support.alone import save_alone
from tests.support.models import HYPERPARAMETERS, SHAPES, STATES, Model, adamw, fill_state
from tests.support.oracle import full_tensor
from tests.support.ranks import RankPool
from tests.support.sharded import chunked, cut, sharded


class OwnPlanner(DefaultLoadPlanner):
    """Makes the face go by the planner's code."""


WAYS = pytest.mark.parametrize("planner", [None, OwnPlanner], ids=["ranged", "by-planner"])


def load(path: str, model: dict[str, Any], planner: type[DefaultLoadPlanner] | None) -> dict[str, Any]:
    made = planner() if planner else None
    return ours.load_sharded_optimizer_state_dict(model, "optim", FileSystemReader(path), made)["optim"]


def check_shards(value: ShardedTensor, full: torch.Tensor) -> int:
    for shard in value.local_shards():
        assert torch.equal(shard.tensor, cut(full, region_of(shard.metadata)))
    return sum(shard.tensor.numel() for shard in value.local_shards())


def load_several_shards(path: str, planner: Any) -> int:
    """Rank 0 holds two corners, rank 1 the other two, rank 2 nothing."""
    boxes = {0: [((0, 0), (20, 4)), ((20, 4), (28, 2))], 1: [((0, 4), (20, 2)), ((20, 0), (28, 4))], 2: []}
    like = sharded((48, 6), boxes)
    loaded = load(path, {"even.weight": like}, planner)
    value = loaded["state"]["even.weight"]["exp_avg"]
    assert len(value.local_shards()) == len(boxes[dist.get_rank()])
    assert value.metadata().shards_metadata == like.metadata().shards_metadata
    return check_shards(value, full_tensor("even.weight", "exp_avg", (48, 6)))


@WAYS
def test_several_local_shards_and_none(ranks: RankPool, saved_by: dict[int, Path], planner: Any) -> None:
    assert ranks.run(3, load_several_shards, str(saved_by[2]), planner) == [136, 152, 0]


def load_more_ranks_than_rows(path: str, planner: Any) -> int:
    world = dist.group.WORLD
    loaded = load(path, {"five.weight": chunked((5, 3), world), "one.weight": chunked((1,), world)}, planner)
    state = loaded["state"]
    return sum(
        check_shards(state[fqn][name], full_tensor(fqn, name, SHAPES[fqn]))
        for fqn in ("five.weight", "one.weight")
        for name in STATES
    )


@pytest.mark.conformance(3)
@WAYS
def test_more_ranks_than_rows(ranks: RankPool, saved_by: dict[int, Path], planner: Any) -> None:
    """A size-[1] parameter's moments lie as it does; they are no scalars (B16)."""
    assert ranks.run(8, load_more_ranks_than_rows, str(saved_by[4]), planner) == [8, 6, 6, 6, 6, 0, 0, 0]


PLACEMENTS = {
    "even.weight": [Replicate(), Cut(1)],
    "thirty.weight": [Cut(0), Cut(1)],
    "cube.weight": [Cut(2), Cut(1)],
    "seven.weight": [Cut(1), Replicate()],
    "five.weight": [Replicate(), Replicate()],
}


def load_dtensors(path: str, planner: Any) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    model = {fqn: distribute_tensor(torch.zeros(SHAPES[fqn]), mesh, how) for fqn, how in PLACEMENTS.items()}
    loaded = load(path, model, planner)
    for fqn, how in PLACEMENTS.items():
        for name in STATES:
            value = loaded["state"][fqn][name]
            assert (value.device_mesh, list(value.placements)) == (mesh, how)
            assert torch.equal(value.full_tensor(), full_tensor(fqn, name, SHAPES[fqn])), fqn


@pytest.mark.conformance(4)
@WAYS
def test_dtensors_on_a_mesh(ranks: RankPool, saved_by: dict[int, Path], planner: Any) -> None:
    ranks.run(4, load_dtensors, str(saved_by[3]), planner)


def load_fsdp2_over_tp(path: str, planner: Any) -> None:
    """FSDP2 over TP by rows: both axes cut dimension 0, the inner one first (_StridedShard)."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = Model({"even.weight": (48, 6), "thirty.weight": (30, 4)})
    for module in model.children():
        module.register_parameter(
            "weight", torch.nn.Parameter(distribute_tensor(module.weight.detach(), mesh["tp"], [Cut(0)]))
        )
    fully_shard(model, mesh=mesh["dp"])
    parameters = dict(model.named_parameters())
    assert any(type(placement).__name__ == "_StridedShard" for placement in parameters["even.weight"].placements)
    loaded = load(path, parameters, planner)
    for fqn, parameter in parameters.items():
        value = loaded["state"][fqn]["exp_avg"]
        assert (value.device_mesh, value.placements) == (parameter.device_mesh, parameter.placements)
        assert torch.equal(value.full_tensor(), full_tensor(fqn, "exp_avg", SHAPES[fqn])), fqn


@pytest.mark.conformance(4)
@WAYS
def test_fsdp2_over_tp(ranks: RankPool, saved_by: dict[int, Path], planner: Any) -> None:
    ranks.run(4, load_fsdp2_over_tp, str(saved_by[3]), planner)


def load_beside_a_mesh(path: str, planner: Any) -> int:
    """Parameters of one pipeline stage lie on ranks 0 and 1, those of the other on 2 and 3."""
    meshes = [dist.device_mesh.DeviceMesh("cpu", ranks) for ranks in ([0, 1], [2, 3])]
    model = {
        fqn: DTensor.from_local(
            torch.zeros((24, 6) if mesh.get_coordinate() else (0,)),
            mesh,
            [Cut(0)],
            shape=torch.Size((48, 6)),
            stride=(6, 1),
            run_check=False,
        )
        for fqn, mesh in zip(("even.weight", "other.weight"), meshes, strict=True)
    }
    loaded = load(path, model, planner)
    here = ("even.weight", "other.weight")[dist.get_rank() // 2]
    for fqn in model:
        local = loaded["state"][fqn]["exp_avg"].to_local()
        if fqn == here:
            row = 24 * (dist.get_rank() % 2)
            assert torch.equal(local, full_tensor(fqn, "exp_avg", (48, 6))[row : row + 24])
        else:
            assert local.numel() == 0
    return 1


@WAYS
def test_ranks_outside_a_tensors_mesh(ranks: RankPool, tmp_path: Path, planner: Any) -> None:
    state = {fqn: {"exp_avg": full_tensor(fqn, "exp_avg", (48, 6))} for fqn in ("even.weight", "other.weight")}
    save_alone({"optim": {"state": state}}, tmp_path / "ckpt")
    ranks.run(4, load_beside_a_mesh, str(tmp_path / "ckpt"), planner)


def load_plain(path: str, planner: Any) -> None:
    """What isn't sharded is whole; what is no tensor is not looked at."""
    model = {fqn: torch.zeros(shape) for fqn, shape in SHAPES.items()} | {"layer._extra_state": {"any": "thing"}}
    loaded = load(path, model, planner)
    for fqn, shape in SHAPES.items():
        for name in STATES:
            assert type(loaded["state"][fqn][name]) is torch.Tensor
            assert torch.equal(loaded["state"][fqn][name], full_tensor(fqn, name, shape))


@WAYS
def test_plain_tensors_stay_whole(ranks: RankPool, saved_by: dict[int, Path], planner: Any) -> None:
    ranks.run(2, load_plain, str(saved_by[4]), planner)


FACTORED = {"row": (48, 1), "col": (1, 6), "scale": (1,), "exp_avg": (48, 6), "step": ()}


def load_factored(path: str, planner: Any, known: bool) -> dict[str, Any]:
    model = {"even.weight": chunked((48, 6), dist.group.WORLD)} if known else {}
    state = load(path, model, planner)["state"]["even.weight"]
    for name, shape in FACTORED.items():
        full = full_tensor("even.weight", name, shape)
        if isinstance(state[name], ShardedTensor):
            check_shards(state[name], full)
        else:
            assert torch.equal(state[name], full)
    return {name: type(value).__name__ for name, value in state.items()}


@pytest.mark.conformance(22)
@WAYS
@pytest.mark.parametrize("known", [True, False])
def test_state_of_other_shapes_is_whole(ranks: RankPool, tmp_path: Path, planner: Any, known: bool) -> None:
    state = {name: full_tensor("even.weight", name, shape) for name, shape in FACTORED.items()}
    save_alone({"optim": {"state": {"even.weight": state}}}, tmp_path / "ckpt")
    for types in ranks.run(2, load_factored, str(tmp_path / "ckpt"), planner, known):
        # Of a parameter that isn't known, shapes that disagree say nothing: then nothing is cut.
        assert types == dict.fromkeys(FACTORED, "Tensor") | ({"exp_avg": "ShardedTensor"} if known else {})


def load_statistics(path: str, planner: Any) -> None:
    world = dist.group.WORLD
    loaded = load(path, {"tall": chunked((48, 6), world), "square": chunked((6, 6), world)}, planner)
    for fqn, rows in (("tall", 48), ("square", 6)):
        assert torch.equal(loaded["state"][fqn]["left"], full_tensor(fqn, "left", (rows, rows)))
        check_shards(loaded["state"][fqn]["exp_avg"], full_tensor(fqn, "exp_avg", (rows, 6)))


@pytest.mark.conformance(22)
@WAYS
def test_a_square_matrixs_statistics_are_whole_too(ranks: RankPool, tmp_path: Path, planner: Any) -> None:
    """They have its shape by accident: the same name has another shape than its parameter elsewhere."""
    state = {
        fqn: {"left": full_tensor(fqn, "left", (rows, rows)), "exp_avg": full_tensor(fqn, "exp_avg", (rows, 6))}
        for fqn, rows in (("tall", 48), ("square", 6))
    }
    save_alone({"optim": {"state": state}}, tmp_path / "ckpt")
    ranks.run(2, load_statistics, str(tmp_path / "ckpt"), planner)


def load_zero_elements(path: str, planner: Any) -> None:
    state = load(path, {}, planner)["state"]["none.weight"]
    assert state["exp_avg"].size() == (0, 4)
    assert state["step"] == 7.0


@pytest.mark.conformance(3)
@WAYS
def test_tensors_without_elements(ranks: RankPool, tmp_path: Path, planner: Any) -> None:
    state = {"exp_avg": torch.zeros(0, 4), "step": torch.tensor(7.0)}
    save_alone({"optim": {"state": {"none.weight": state}}}, tmp_path / "ckpt")
    ranks.run(2, load_zero_elements, str(tmp_path / "ckpt"), planner)


def save_plain_optimizer(path: Path) -> dict[str, Any]:
    """``optimizer.state_dict()`` as it is: keyed by integers, param groups in a list."""
    model = Model()
    optimizer = adamw(model)
    fill_state(model, optimizer)
    saved = optimizer.state_dict()
    save_alone({"optim": saved}, path)
    return saved


def load_integer_keys(path: str, planner: Any) -> None:
    loaded = load(path, {}, planner)
    model = Model()
    optimizer = adamw(model, ({"lr": 9.0}, {"lr": 8.0}))
    for state in loaded["state"].values():
        for name in STATES:  # on one rank, the only shard is the whole
            state[name] = state[name].local_shards()[0].tensor
    optimizer.load_state_dict(loaded)
    for fqn, parameter in model.named_parameters():
        for name in STATES:
            assert torch.equal(optimizer.state[parameter][name], full_tensor(fqn, name, SHAPES[fqn]))
    assert [group["lr"] for group in optimizer.param_groups] == [values["lr"] for values in HYPERPARAMETERS]


@pytest.mark.conformance(9)
@WAYS
def test_integer_keys_come_back_as_integers(ranks: RankPool, tmp_path: Path, planner: Any) -> None:
    save_plain_optimizer(tmp_path / "ckpt")
    ranks.run(1, load_integer_keys, str(tmp_path / "ckpt"), planner)


def save_flattened(path: str) -> None:
    model = Model()
    optimizer = adamw(model)
    fill_state(model, optimizer)
    flat = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    dcp.save({"optim": flat}, checkpoint_id=path)


def load_flattened(path: str, planner: Any) -> int:
    loaded = load(path, {"even.weight": chunked((48, 6), dist.group.WORLD)}, planner)
    assert loaded["param_groups.even.weight.lr"] == 0.125
    return check_shards(
        loaded["state.even.weight.exp_avg"], full_tensor("even.weight", "exp_avg", SHAPES["even.weight"])
    )


@pytest.mark.conformance(9)
@WAYS
def test_flattened_keys(ranks: RankPool, tmp_path: Path, planner: Any) -> None:
    ranks.run(1, save_flattened, str(tmp_path / "ckpt"))
    assert ranks.run(3, load_flattened, str(tmp_path / "ckpt"), planner) == [96, 96, 96]


def load_unrecorded(path: str, planner: Any) -> int:
    loaded = load(path, {}, planner)
    assert loaded["param_groups"] == [{"lr": 0.5, "params": ["even.weight"]}]
    return check_shards(loaded["state"]["even.weight"]["exp_avg"], full_tensor("even.weight", "exp_avg", (48, 6)))


@pytest.mark.conformance(9)
@WAYS
def test_checkpoints_without_recorded_paths(ranks: RankPool, tmp_path: Path, planner: Any) -> None:
    """planner_data is None (B5)."""
    saved = {
        "optim.state.even.weight.exp_avg": full_tensor("even.weight", "exp_avg", (48, 6)),
        "optim.param_groups": [{"lr": 0.5, "params": ["even.weight"]}],
    }
    save_alone(saved, tmp_path / "ckpt", planner=DefaultSavePlanner(flatten_state_dict=False))
    assert ranks.run(2, load_unrecorded, str(tmp_path / "ckpt"), planner) == [144, 144]


def load_in_subgroups(path: str, planner: Any) -> int:
    """Two loads of two ranks in one job, the second one not led by rank 0."""
    groups = [dist.new_group([0, 2]), dist.new_group([3, 1])]
    group = groups[dist.get_rank() % 2]
    made = planner() if planner else None
    loaded = ours.load_sharded_optimizer_state_dict({}, "optim", FileSystemReader(path), made, process_group=group)
    value = loaded["optim"]["state"]["even.weight"]["exp_avg"]
    assert value._process_group is group
    return check_shards(value, full_tensor("even.weight", "exp_avg", (48, 6)))


@pytest.mark.conformance(18)
@WAYS
def test_process_group(ranks: RankPool, saved_by: dict[int, Path], planner: Any) -> None:
    assert ranks.run(4, load_in_subgroups, str(saved_by[3]), planner) == [144] * 4
