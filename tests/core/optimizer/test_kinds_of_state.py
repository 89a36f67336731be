"""State that an optimizer has as a number at one time and as a tensor at another, in another order in memory, or beside state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import shardferry
from shardferry.errors import InstallError
from tests.support.alone import save_alone


class Trusting(torch.optim.SGD):
    """Has a ratio that is a number at first, and a basis that lies in memory by columns."""

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                first = "basis" not in state
                state["ratio"] = 1.0 if first else parameter.detach().norm()
                state["basis"] = torch.arange(12.0).view(3, 4).t()


class Counting(torch.optim.SGD):
    """Has a counter beside its state."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr, momentum=0.5)
        self.total = 0

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        super().step()
        self.total += 1

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "total": self.total}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.total = state_dict["total"]


def stepped(cls: type, times: int) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    optimizer = cls(model.parameters(), lr=0.125)
    for _ in range(times):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("saved", [1, 2], ids=["number", "tensor"])
@pytest.mark.parametrize("live", [0, 1, 2], ids=["before-first-step", "number", "tensor"])
def test_the_saved_kind_stays(tmp_path: Path, saved: int, live: int) -> None:
    _, optimizer = stepped(Trusting, saved)
    save_alone({"optim": optimizer.state_dict()}, tmp_path)
    model, resumed = stepped(Trusting, live)
    shardferry.load_optimizer_state(model, resumed, tmp_path)
    for mine, theirs in zip(optimizer.state.values(), resumed.state.values(), strict=True):
        assert type(theirs["ratio"]) is type(mine["ratio"])
        assert theirs["ratio"] == mine["ratio"]


@pytest.mark.parametrize("live", [0, 2], ids=["before-first-step", "after-steps"])
def test_the_order_in_memory_is_the_optimizers(tmp_path: Path, live: int) -> None:
    _, optimizer = stepped(Trusting, 2)
    save_alone({"optim": optimizer.state_dict()}, tmp_path)
    model, resumed = stepped(Trusting, live)
    shardferry.load_optimizer_state(model, resumed, tmp_path)
    for mine, theirs in zip(optimizer.state.values(), resumed.state.values(), strict=True):
        assert theirs["basis"].stride() == mine["basis"].stride() == (1, 4)
        assert torch.equal(theirs["basis"], mine["basis"])


def test_a_trial_leaves_alone_what_is_not_loaded(tmp_path: Path) -> None:
    """Its step counts on copies of the live counters."""
    model = nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    for times in (5, 2):
        for _ in range(times):
            optimizer.zero_grad()
            model(torch.ones(2, 3)).square().sum().backward()
            optimizer.step()
        if times == 5:
            save_alone({"optim": get_optimizer_state_dict(model, optimizer)}, tmp_path)
    shardferry.load_optimizer_state(model, optimizer, tmp_path, exclude=["bias"])
    assert [int(optimizer.state[parameter]["step"]) for parameter in (model.weight, model.bias)] == [5, 7]


def test_entries_beside_state_are_not_dropped_silently(tmp_path: Path) -> None:
    _, optimizer = stepped(Counting, 3)
    only_state = {name: value for name, value in optimizer.state_dict().items() if name != "total"}
    save_alone({"optim": only_state}, tmp_path)
    model, resumed = stepped(Counting, 1)
    before = [state["momentum_buffer"].clone() for state in resumed.state.values()]
    with pytest.raises(InstallError, match=r"has \['total'\] beside state and param_groups, which were not saved"):
        shardferry.load_optimizer_state(model, resumed, tmp_path)
    for state, buffer in zip(resumed.state.values(), before, strict=True):
        assert torch.equal(state["momentum_buffer"], buffer)
    report = shardferry.load_optimizer_state(model, resumed, tmp_path, keys="allow_missing")
    assert any("'total'" in warning for warning in report.warnings)
    assert resumed.total == 1
    for state, saved in zip(resumed.state.values(), optimizer.state.values(), strict=True):
        assert torch.equal(state["momentum_buffer"], saved["momentum_buffer"])


class Compiled(torch.optim.SGD):
    """Compiles its step, as torchao's do."""

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        compiled = torch.compile(_decay, backend="eager", fullgraph=True, dynamic=False)
        for group in self.param_groups:
            for parameter in group["params"]:
                average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                compiled(parameter.detach(), parameter.grad, average)


def _decay(parameter: torch.Tensor, grad: torch.Tensor, average: torch.Tensor) -> None:
    average.lerp_(grad, 0.25)
    parameter.sub_(average, alpha=0.125)


def test_a_trial_does_not_spoil_a_compiled_step(tmp_path: Path) -> None:
    """Else dynamo marks the function as one that it skips, and the live optimizer can't step."""
    model, optimizer = stepped(Compiled, 2)
    save_alone({"optim": optimizer.state_dict(), "model": model.state_dict()}, tmp_path)
    torch.compiler.reset()
    other, resumed = stepped(Compiled, 0)
    shardferry.load_optimizer_state(other, resumed, tmp_path, model_key="model")
    for module, one in ((model, optimizer), (other, resumed)):
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        one.step()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
