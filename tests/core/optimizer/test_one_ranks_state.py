"""Plain state beside sharded parameters: what each rank computes of its own part, and what is the same on all."""

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

import shardferry
from tests.support.ranks import RankPool

Entry = Callable[
    [torch.Tensor, torch.Tensor], torch.Tensor
]  # of a parameter's local tensor, and of its DTensor's gradient


def largest(local: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    return local.abs().max()


def sums_of_rows(local: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    return torch.stack([local.sum(), local.square().sum()])


def running(local: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    total = torch.zeros((), device=local.device)
    total.add_(local.norm())
    return total


def of_all_ranks(local: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    assert isinstance(grad, DTensor)
    return grad.abs().max().full_tensor()


def counter(local: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    return local.new_full((), 3.0) * 0.5


class Scaling(torch.optim.SGD):
    """Keeps a plain tensor, made by a function, for each parameter."""

    def __init__(self, params: Any, entry: Entry) -> None:
        super().__init__(params, lr=0.125)
        self.entry = entry

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                local = parameter.detach()
                local = local.to_local() if isinstance(local, DTensor) else local
                self.state[parameter]["scale"] = self.entry(local, parameter.grad)


def stepped(entry: Entry, times: int) -> tuple[nn.Module, Scaling]:
    torch.manual_seed(0)
    model = nn.Linear(4, 8, bias=False)
    if dist.is_initialized():
        model = fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = Scaling(model.parameters(), entry)
    for _ in range(times):
        optimizer.zero_grad()
        model(torch.arange(8.0).view(2, 4)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def save(path: str, entry: Entry) -> None:
    model, optimizer = stepped(entry, 2)
    dcp.save({"optim": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=path)


def load(path: str, entry: Entry, times: int) -> str:
    """What the error says; nothing where the same was loaded as a rank that went on has."""
    _, expected = stepped(entry, 2)
    model, optimizer = stepped(entry, times)
    before = [dict(state) for state in optimizer.state.values()]
    try:
        shardferry.load_optimizer_state(model, optimizer, path)
    except shardferry.ShardferryError as error:
        assert [dict(state) for state in optimizer.state.values()] == before
        return str(error)
    for mine, theirs in zip(optimizer.state.values(), expected.state.values(), strict=True):
        assert torch.equal(mine["scale"], theirs["scale"])
    return ""


@pytest.mark.parametrize("times", [0, 1], ids=["before-first-step", "after-one"])
@pytest.mark.parametrize("entry", [largest, sums_of_rows, running])
def test_what_comes_of_one_ranks_part_is_refused(ranks: RankPool, tmp_path: Path, entry: Entry, times: int) -> None:
    ranks.run(2, save, str(tmp_path), entry)
    said = ranks.run(2, load, str(tmp_path), entry, times)
    assert all("weight: Scaling computes 'scale' of this rank's part of the parameter alone" in one for one in said)


@pytest.mark.parametrize("entry", [of_all_ranks, counter])
def test_what_is_the_same_on_all_ranks_is_loaded(ranks: RankPool, tmp_path: Path, entry: Entry) -> None:
    ranks.run(2, save, str(tmp_path), entry)
    assert ranks.run(2, load, str(tmp_path), entry, 0) == ["", ""]


@pytest.mark.parametrize("entry", [largest, running])
def test_what_comes_of_a_whole_parameter_is_loaded(ranks: RankPool, tmp_path: Path, entry: Entry) -> None:
    ranks.run(1, save, str(tmp_path), entry)
    assert ranks.run(1, load, str(tmp_path), entry, 0) == [""]
    assert ranks.run(2, load, str(tmp_path), entry, 0) != ["", ""]
