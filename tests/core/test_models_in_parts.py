"""Models of which parts are wrapped, added, removed, or on other ranks alone: state and weights, every element bitwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import shardferry
from shardferry.plan.match_keys import KeyReport
from tests.support.alone import save_alone
from tests.support.oracle import full_tensor
from tests.support.ranks import RankPool


def network() -> nn.Sequential:
    """With buffers; every weight and buffer is the oracle's."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
    for fqn, value in (*model.named_parameters(), *model.named_buffers()):
        if value.ndim:
            value.detach().copy_(full_tensor(fqn, "weight", value.shape))
    return model


def blank() -> nn.Sequential:
    model = network()
    for value in (*model.parameters(), *model.buffers()):
        value.detach().zero_()
    return model


@pytest.fixture
def saved(tmp_path: Path) -> str:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    for fqn, parameter in model.named_parameters():
        moments = {name: full_tensor(fqn, name, parameter.shape) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(7.0), **moments}
    state = {"optim": get_optimizer_state_dict(model, optimizer), "model": get_model_state_dict(model)}
    save_alone(state, tmp_path / "ckpt")
    return str(tmp_path / "ckpt")


def whole(value: Any) -> torch.Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def ddp_inside(model: nn.Sequential) -> nn.Module:
    model[0] = DistributedDataParallel(model[0])
    return model


def hsdp(model: nn.Sequential) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


@pytest.mark.parametrize(("wrap", "num_ranks"), [(DistributedDataParallel, 2), (ddp_inside, 2), (hsdp, 4)])
def test_wrapped_models_with_buffers(
    ranks: RankPool, saved: str, wrap: Callable[[nn.Module], nn.Module], num_ranks: int
) -> None:
    ranks.run(num_ranks, load_wrapped, saved, wrap)


def load_wrapped(path: str, wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = wrap(blank())
    optimizer = torch.optim.AdamW(model.parameters())
    shardferry.load_optimizer_state(model, optimizer, path, model_key="model")
    for name, parameter in model.named_parameters():
        fqn = name.replace("module.", "")
        assert torch.equal(whole(parameter), full_tensor(fqn, "weight", parameter.shape)), fqn
        moment = whole(optimizer.state[parameter]["exp_avg"])
        assert torch.equal(moment, full_tensor(fqn, "exp_avg", parameter.shape)), fqn
    (mean,) = (buffer for name, buffer in model.named_buffers() if name.endswith("running_mean"))
    assert torch.equal(whole(mean), full_tensor("1.running_mean", "weight", (6,)))


def load_fsdp1_hybrid(path: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    options = {"sharding_strategy": ShardingStrategy.HYBRID_SHARD, "device_mesh": mesh, "use_orig_params": True}
    model = FullyShardedDataParallel(blank(), device_id=torch.device("cpu"), **options)
    optimizer = torch.optim.AdamW(model.parameters())
    shardferry.load_optimizer_state(model, optimizer, path, model_key="model")
    with FullyShardedDataParallel.summon_full_params(model):
        for name, parameter in model.named_parameters():
            fqn = name.replace("_fsdp_wrapped_module.", "")
            assert torch.equal(parameter, full_tensor(fqn, "weight", parameter.shape)), fqn
    assert torch.equal(
        model.get_buffer("_fsdp_wrapped_module.1.running_mean"), full_tensor("1.running_mean", "weight", (6,))
    )


def test_hsdp_by_fsdp1_with_buffers(ranks: RankPool, saved: str) -> None:
    ranks.run(4, load_fsdp1_hybrid, saved)


def load_where_one_has_nothing(path: str, nothing: str) -> None:
    """Rank 1 is a pipeline stage that trains nothing."""
    if dist.get_rank() == 1:
        idle = ([], []) if nothing == "no-optimizer" else (nn.ReLU(), torch.optim.AdamW([{"params": []}]))
        shardferry.load_optimizer_state(*idle, path)
        return
    model = blank()
    optimizer = torch.optim.AdamW(model.parameters())
    shardferry.load_optimizer_state(model, optimizer, path)
    assert torch.equal(optimizer.state[model[0].weight]["exp_avg"], full_tensor("0.weight", "exp_avg", (6, 4)))


@pytest.mark.parametrize("nothing", ["no-optimizer", "no-parameters"])
def test_a_rank_that_trains_nothing(ranks: RankPool, saved: str, nothing: str) -> None:
    ranks.run(2, load_where_one_has_nothing, saved, nothing)


def load_changed(path: str) -> KeyReport:
    """The first layer is gone, another one has come."""
    old = blank()
    model = fully_shard(nn.Sequential(nn.Identity(), old[1], old[2], nn.Linear(4, 3)))
    optimizer = torch.optim.AdamW(model.parameters())
    report = shardferry.load_optimizer_state(model, optimizer, path, keys=["allow_missing", "ignore_unexpected"])
    moment = whole(optimizer.state[model[2].weight]["exp_avg"])
    assert torch.equal(moment, full_tensor("2.weight", "exp_avg", (4, 6)))
    assert model[3].weight not in optimizer.state
    return report


def test_parameters_added_and_removed_under_fsdp2(ranks: RankPool, saved: str) -> None:
    expected = KeyReport(missing=("3.weight", "3.bias"), unexpected=("0.bias", "0.weight"))
    assert ranks.run(2, load_changed, saved) == [expected] * 2


def test_an_optimizer_of_which_some_parameters_have_stepped(saved: str) -> None:
    model = blank()
    optimizer = torch.optim.AdamW(model.parameters())
    model[0].weight.grad = torch.ones(6, 4)
    optimizer.step()
    shardferry.load_optimizer_state(model, optimizer, saved)
    for fqn, parameter in model.named_parameters():
        assert torch.equal(optimizer.state[parameter]["exp_avg"], full_tensor(fqn, "exp_avg", parameter.shape)), fqn
