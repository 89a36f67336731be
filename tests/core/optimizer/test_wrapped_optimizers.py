"""Optimizers on wrapped models: factors, statistics, every dtype, numbers; before and after the first step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import shardferry
from tests.support.ranks import RankPool
from tests.support.shampoo import ShampooLike, check_shampoo

WIDTH = 6  # square in the middle: there a statistic has its parameter's shape


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3))


def plain(model: nn.Module) -> nn.Module:
    return model


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp2(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {"plain": plain, "ddp": ddp, "fsdp2": fsdp2}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, times: int) -> None:
    """The same gradients on all ranks, so that they stay in step whatever the wrapper."""
    inputs = torch.linspace(-1, 1, 12).view(3, 4)
    for _ in range(times):
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()


def whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def named_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): parameter for name, parameter in model.named_parameters()}


# --- an optimizer with everything ------------------------------------------------------------------------------------


def shampoo(wrapper: str, *, stepped: bool) -> tuple[nn.Module, ShampooLike]:
    model = WRAPPERS[wrapper](network())
    optimizer = ShampooLike(list(named_parameters(model).items()))
    if stepped:
        step(model, optimizer, 1)
    return model, optimizer


def save_shampoo(path: str, wrapper: str) -> None:
    model, optimizer = shampoo(wrapper, stepped=True)
    named = {id(parameter): name for name, parameter in named_parameters(model).items()}
    state = {named[id(parameter)]: values for parameter, values in optimizer.state.items()}
    groups = [{"lr": 0.5, "params": list(named.values())}]
    dcp.save({"optim": {"state": state, "param_groups": groups}}, checkpoint_id=path)


def load_shampoo(path: str, wrapper: str, stepped: bool) -> int:
    model, optimizer = shampoo(wrapper, stepped=stepped)
    for state in optimizer.state.values():  # what was there must not shine through
        state["step"] = 0
        for value in state.values():
            if isinstance(value, torch.Tensor):
                (value.to_local() if isinstance(value, DTensor) else value).zero_()
    shardferry.load_optimizer_state(model, optimizer, path)
    return sum(check_shampoo(fqn, p, optimizer.state[p]) for fqn, p in named_parameters(model).items())


@pytest.mark.conformance(13)
@pytest.mark.conformance(22)
@pytest.mark.parametrize("stepped", [False, True], ids=["before-first-step", "after"])
@pytest.mark.parametrize(("source", "target"), [("fsdp2", "fsdp2"), ("plain", "fsdp2"), ("fsdp2", "ddp")])
def test_statistics_and_every_dtype(ranks: RankPool, tmp_path: Path, source: str, target: str, stepped: bool) -> None:
    ranks.run(2, save_shampoo, str(tmp_path / "ckpt"), source)
    assert all(ranks.run(3, load_shampoo, str(tmp_path / "ckpt"), target, stepped))


# --- from FSDP2 to DDP; tests/optimizers has every optimizer, under the same wrapper on both sides -----------------------

MAKERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
}


def muon(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=0.1)


def made(name: str, model: nn.Module) -> torch.optim.Optimizer:
    return muon(model) if name == "muon" else MAKERS[name](model.parameters())


def save_stepped(path: str, name: str) -> dict[str, dict[str, Any]]:
    model = fsdp2(network())
    optimizer = made(name, model)
    step(model, optimizer, 3)
    dcp.save({"optim": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=path)
    return _gathered(model, optimizer)


def _gathered(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    state = {n: optimizer.state[p] for n, p in named_parameters(model).items() if optimizer.state.get(p)}
    return {fqn: {name: whole(value) for name, value in entries.items()} for fqn, entries in state.items()}


def load_and_go_on(path: str, name: str, wrapper: str, stepped: int) -> dict[str, dict[str, Any]]:
    model = WRAPPERS[wrapper](network())
    optimizer = made(name, model)
    step(model, optimizer, stepped)
    shardferry.load_optimizer_state(model, optimizer, path)
    loaded = _gathered(model, optimizer)
    loaded = {
        fqn: {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in s.items()} for fqn, s in loaded.items()
    }
    step(model, optimizer, 1)
    return loaded


@pytest.mark.parametrize("stepped", [0, 2], ids=["before-first-step", "after-steps"])
@pytest.mark.parametrize("name", [*MAKERS, "muon"])
def test_from_fsdp2_to_ddp(ranks: RankPool, tmp_path: Path, name: str, stepped: int) -> None:
    """State is what was gathered when it was saved, bitwise, and the optimizer takes a step with it."""
    saved = ranks.run(3, save_stepped, str(tmp_path / "ckpt"), name)[0]
    (loaded,) = ranks.run(1, load_and_go_on, str(tmp_path / "ckpt"), name, "ddp", stepped)
    assert set(loaded) == set(saved)
    for fqn, entries in saved.items():
        assert set(loaded[fqn]) == set(entries)
        for entry, value in entries.items():
            assert type(loaded[fqn][entry]) is type(value)
            assert torch.equal(torch.as_tensor(loaded[fqn][entry]), torch.as_tensor(value)), f"{fqn}.{entry}"
