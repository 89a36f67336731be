"""`shardferry.dcp` in the place of torch's module: same names, same types, right numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    ShardingStrategy,
    StateDictType,
)
from torch.distributed.tensor import DTensor

import shardferry.dcp as ours
from tests.support.damage import hole
from tests.support.models import HYPERPARAMETERS, SHAPES, STATES, STEP, Model, fsdp1, fsdp2
from tests.support.oracle import full_tensor
from tests.support.ranks import RankPool

NUM_ELEMENTS = 2 * sum(torch.Size(shape).numel() for shape in SHAPES.values())


def local_pieces(value: Any) -> list[tuple[torch.Tensor, tuple[int, ...]]]:
    """A sharded value's local tensors, and where each begins in the whole; torch's own metadata says so."""
    if isinstance(value, ShardedTensor):
        return [(shard.tensor, tuple(shard.metadata.shard_offsets)) for shard in value.local_shards()]
    return [(value, (0,) * value.ndim)]


def compare(loaded: dict[str, Any]) -> int:
    """Every local element against the oracle; returns how many."""
    compared = 0
    state = loaded["optim"]["state"]
    assert set(state) == set(SHAPES)
    for fqn, shape in SHAPES.items():
        assert float(state[fqn]["step"]) == STEP
        for name in STATES:
            full = full_tensor(fqn, name, shape)
            for local, offsets in local_pieces(state[fqn][name]):
                box = tuple(slice(o, o + n) for o, n in zip(offsets, local.shape, strict=True))
                assert torch.equal(local, full[box]), f"{fqn}.{name}"
                compared += local.numel()
    groups = loaded["optim"]["param_groups"]
    assert [
        {name: group[name] for name in expected} for group, expected in zip(groups, HYPERPARAMETERS, strict=True)
    ] == list(HYPERPARAMETERS)
    assert sorted(fqn for group in groups for fqn in group["params"]) == sorted(SHAPES)
    return compared


def load_with_reader(path: str, reader: type[FileSystemReader], planner: Any) -> tuple[int, int]:
    made = planner() if planner else None
    used = reader(path)
    loaded = ours.load_sharded_optimizer_state_dict({}, "optim", used, made)
    types = {type(loaded["optim"]["state"][fqn][name]) for fqn in SHAPES for name in STATES}
    assert types == {ShardedTensor}
    return compare(loaded), getattr(used, "num_reads", 0) + getattr(made, "num_plans", 0)


class CountingReader(FileSystemReader):
    """Somebody's own reader."""

    num_reads = 0

    def read_data(self, plan: Any, planner: Any) -> Any:
        self.num_reads += len(plan.items)
        return super().read_data(plan, planner)


class CountingPlanner(DefaultLoadPlanner):
    """Somebody's own planner."""

    num_plans = 0

    def create_local_plan(self) -> Any:
        self.num_plans += 1
        return super().create_local_plan()


@pytest.mark.parametrize("target", [1, 2, 3, 8])
@pytest.mark.parametrize("planner", [None, DefaultLoadPlanner], ids=["no-planner", "default-planner"])
def test_parameters_that_are_not_known_are_cut_over_the_world(
    ranks: RankPool, saved_by: dict[int, Path], target: int, planner: Any
) -> None:
    results = ranks.run(target, load_with_reader, str(saved_by[4]), FileSystemReader, planner)
    assert sum(compared for compared, _ in results) == NUM_ELEMENTS


@pytest.mark.parametrize(("reader", "planner"), [(CountingReader, None), (FileSystemReader, CountingPlanner)])
def test_own_readers_and_planners_are_used(
    ranks: RankPool, saved_by: dict[int, Path], reader: Any, planner: Any
) -> None:
    results = ranks.run(3, load_with_reader, str(saved_by[2]), reader, planner)
    assert sum(compared for compared, _ in results) == NUM_ELEMENTS
    assert all(count > 0 for _, count in results)


def load_fsdp2(path: str) -> int:
    model = fsdp2(Model())
    loaded = ours.load_sharded_optimizer_state_dict(get_model_state_dict(model), "optim", FileSystemReader(path))
    parameters = dict(model.named_parameters())
    compared = 0
    for fqn, parameter in parameters.items():
        for name in STATES:
            value = loaded["optim"]["state"][fqn][name]
            assert isinstance(value, DTensor)
            assert (value.device_mesh, value.placements) == (parameter.device_mesh, parameter.placements)
            assert torch.equal(value.full_tensor(), full_tensor(fqn, name, SHAPES[fqn]))
            compared += value.to_local().numel()
    return compared


@pytest.mark.parametrize("target", [2, 3])
def test_dtensors_stay_dtensors(ranks: RankPool, saved_by: dict[int, Path], target: int) -> None:
    assert sum(ranks.run(target, load_fsdp2, str(saved_by[4]))) == NUM_ELEMENTS


def _sharded(model: FullyShardedDataParallel) -> Any:
    return FullyShardedDataParallel.state_dict_type(
        model,
        StateDictType.SHARDED_STATE_DICT,
        ShardedStateDictConfig(offload_to_cpu=False),
        ShardedOptimStateDictConfig(offload_to_cpu=False),
    )


def save_fsdp1(path: str) -> None:
    """Stock FSDP1 and stock dcp.save. The state is the weights' own values and their negatives."""
    model = fsdp1(Model(), use_orig_params=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.125)
    model().backward()
    optimizer.step()
    for parameter, state in optimizer.state.items():
        state["exp_avg"], state["exp_avg_sq"] = parameter.detach().clone(), -parameter.detach()
    with _sharded(model):
        dcp.save({"optim": FullyShardedDataParallel.optim_state_dict(model, optimizer)}, checkpoint_id=path)


def load_fsdp1(path: str, replicas: int) -> int:
    """The state goes back through FSDP1's own ``optim_state_dict_to_load``."""
    world_size = dist.get_world_size()
    if replicas == 1:
        model: Any = fsdp1(Model(), use_orig_params=True)
    else:
        mesh = init_device_mesh("cpu", (replicas, world_size // replicas))
        model = FullyShardedDataParallel(
            Model(),
            use_orig_params=True,
            device_id=torch.device("cpu"),
            device_mesh=mesh,
            sharding_strategy=ShardingStrategy.HYBRID_SHARD,
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=9.0)
    with _sharded(model):
        loaded = ours.load_sharded_optimizer_state_dict(model.state_dict(), "optim", FileSystemReader(path))
        flat = FullyShardedDataParallel.optim_state_dict_to_load(model, optimizer, loaded["optim"])
    optimizer.load_state_dict(flat)
    assert optimizer.param_groups[0]["lr"] == 0.125
    compared = 0
    weights = {fqn: full_tensor(fqn, "weight", shape) for fqn, shape in SHAPES.items()}
    known = torch.cat([weight.view(-1) for weight in weights.values()])
    for state in optimizer.state.values():
        assert torch.equal(state["exp_avg"], -state["exp_avg_sq"])
        # AdamW took one step of 0.125 x (1 + decay) at most: to fp32 these whole numbers did not change by more than 1 in 1e3.
        distance = (state["exp_avg"].view(-1, 1) - known.view(1, -1)).abs() / known
        assert bool((distance.min(dim=1).values < 1e-2).all())
        compared += state["exp_avg"].numel()
    return compared


@pytest.mark.conformance(5)
@pytest.mark.parametrize(("target", "replicas"), [(2, 1), (3, 1), (4, 2)], ids=["shrink", "3", "hsdp"])
def test_fsdp1_takes_it(ranks: RankPool, tmp_path: Path, target: int, replicas: int) -> None:
    ranks.run(4, save_fsdp1, str(tmp_path / "ckpt"))
    compared = ranks.run(target, load_fsdp1, str(tmp_path / "ckpt"), replicas)
    assert sum(compared) == replicas * NUM_ELEMENTS // 2


def load_key(path: str, key: str, reader: Any) -> None:
    ours.load_sharded_optimizer_state_dict({}, key, reader(path))


@pytest.mark.conformance(9)
@pytest.mark.parametrize("reader", [FileSystemReader, CountingReader])
def test_wrong_key(ranks: RankPool, saved_by: dict[int, Path], reader: Any) -> None:
    outcomes = ranks.outcomes(2, load_key, str(saved_by[2]), "opt", reader)
    for done, message in outcomes:
        assert not done
        assert "PlanError: " in message
        assert "optimizer_key 'opt'; top-level keys are" in message


@pytest.mark.conformance(7)
def test_hole(ranks: RankPool, saved_by: dict[int, Path], tmp_path: Path) -> None:
    import shutil

    shutil.copytree(saved_by[2], tmp_path / "ckpt")
    hole(tmp_path / "ckpt")
    outcomes = ranks.outcomes(2, load_key, str(tmp_path / "ckpt"), "optim", FileSystemReader)
    assert [done for done, _ in outcomes] == [False, False]
    assert all("are in no saved chunk" in message for _, message in outcomes)


def load_in_subgroups(path: str) -> int:
    """Two stages of two ranks in one job, the second one not led by rank 0."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = groups[dist.get_rank() // 2]
    loaded = ours.load_sharded_optimizer_state_dict({}, "optim", FileSystemReader(path), process_group=group)
    return compare(loaded)


@pytest.mark.conformance(18)
def test_process_group(ranks: RankPool, saved_by: dict[int, Path]) -> None:
    compared = ranks.run(4, load_in_subgroups, str(saved_by[3]))
    assert compared[0] + compared[1] == compared[2] + compared[3] == NUM_ELEMENTS
