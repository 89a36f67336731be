"""Torch's own optimizers: state, step and hyperparameters come back as they were, and training goes on alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import shardferry
from tests.support.alone import save_alone

MAKERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.3),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "tensor-lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1)),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5, centered=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
}


def build(maker: Callable[[Any], torch.optim.Optimizer]) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
    return model, maker(model.parameters())


def step(model: nn.Module, optimizer: torch.optim.Optimizer, times: int) -> None:
    inputs = torch.linspace(-1, 1, 24).view(4, 6)
    for _ in range(times):
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("stepped", [0, 2], ids=["before-first-step", "after-steps"])
def test_training_goes_on_alike(tmp_path: Path, name: str, stepped: int) -> None:
    model, optimizer = build(MAKERS[name])
    step(model, optimizer, 3)
    save_alone({"optim": get_optimizer_state_dict(model, optimizer)}, tmp_path / "ckpt")

    other, resumed = build(MAKERS[name])
    step(other, resumed, stepped)
    other.load_state_dict(model.state_dict())
    shardferry.load_optimizer_state(other, resumed, tmp_path / "ckpt")
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert set(resumed.state[theirs]) == set(optimizer.state[mine])
        for entry, value in optimizer.state[mine].items():
            found = resumed.state[theirs][entry]
            assert (type(found), getattr(found, "dtype", None)) == (type(value), getattr(value, "dtype", None))
            assert torch.equal(torch.as_tensor(found), torch.as_tensor(value)), entry

    step(model, optimizer, 3)
    step(other, resumed, 3)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.conformance(10)
def test_flags_of_the_checkpoint_decide_where_step_is(tmp_path: Path) -> None:
    """As in torch: the saved hyperparameters replace the live ones, ``fused`` among them."""
    model, optimizer = build(MAKERS["fused"])
    step(model, optimizer, 1)
    save_alone({"optim": get_optimizer_state_dict(model, optimizer)}, tmp_path / "ckpt")
    other, resumed = build(MAKERS["adamw"])
    shardferry.load_optimizer_state(other, resumed, tmp_path / "ckpt")
    assert resumed.param_groups[0]["fused"] is True
    step(other, resumed, 1)
