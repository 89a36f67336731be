"""State that an optimizer keeps under keys of its own, and entries of its state dict beside ``state``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardferry
from shardferry.errors import InstallError
from tests.support.alone import save_alone


class CountsInState(torch.optim.SGD):
    """As MADGRAD does: its number of steps is ``state["k"]``, and decides how far it goes."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr, momentum=0.5)

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if "k" not in self.state:
            self.state["k"] = torch.zeros(1, dtype=torch.int64)  # type: ignore[index]
        count: torch.Tensor = self.state["k"]  # type: ignore[index, assignment]
        count += 1
        for group in self.param_groups:
            group["lr"] = 0.125 / int(count)
        super().step()


class HasSchedule(torch.optim.SGD):
    """Has a dict of its own among the parameters' state."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr, momentum=0.5)

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        super().step()
        schedule = self.state["schedule"]  # type: ignore[index]
        schedule["steps"] = schedule.get("steps", 0) + 1
        schedule["means"] = [torch.full((2,), float(schedule["steps"]))]


class CountsBeside(torch.optim.SGD):
    """Has a counter in its state dict."""

    total = 0

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
    step(model, optimizer, times)
    return model, optimizer


def step(model: nn.Module, optimizer: Any, times: int = 1) -> None:
    for _ in range(times):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("live", [0, 2], ids=["before-first-step", "after-steps"])
@pytest.mark.parametrize("optimizer_key", ["optim", ""])
def test_a_value_under_a_key_of_its_own_is_loaded(tmp_path: Path, live: int, optimizer_key: str) -> None:
    model, optimizer = stepped(CountsInState, 3)
    state = optimizer.state_dict()
    save_alone({"optim": state, "model": model.state_dict()} if optimizer_key else state, tmp_path)
    other, resumed = stepped(CountsInState, live)
    held = resumed.state.get("k")
    if optimizer_key:
        shardferry.load_optimizer_state(other, resumed, tmp_path, model_key="model")
    else:
        shardferry.load_optimizer_state(other, resumed, tmp_path, optimizer_key="")
        other.load_state_dict(model.state_dict())
    assert torch.equal(resumed.state["k"], torch.tensor([3]))
    assert held is None or resumed.state["k"] is held
    step(model, optimizer)
    step(other, resumed)
    assert torch.equal(model.weight, other.weight)
    assert optimizer.param_groups[0]["lr"] == resumed.param_groups[0]["lr"] == 0.125 / 4


@pytest.mark.parametrize("live", [0, 2], ids=["before-first-step", "after-steps"])
def test_a_dict_under_a_key_of_its_own_is_loaded(tmp_path: Path, live: int) -> None:
    _, optimizer = stepped(HasSchedule, 3)
    save_alone({"optim": optimizer.state_dict()}, tmp_path)
    model, resumed = stepped(HasSchedule, live)
    shardferry.load_optimizer_state(model, resumed, tmp_path)
    assert resumed.state["schedule"]["steps"] == 3
    assert torch.equal(resumed.state["schedule"]["means"][0], torch.full((2,), 3.0))


@pytest.mark.parametrize("live", [0, 2], ids=["before-first-step", "after-steps"])
def test_a_key_that_was_not_saved_is_named(tmp_path: Path, live: int) -> None:
    _, optimizer = stepped(CountsInState, 3)
    state = optimizer.state_dict()
    del state["state"]["k"]
    save_alone({"optim": state}, tmp_path)
    model, resumed = stepped(CountsInState, live)
    with pytest.raises(InstallError, match=r"has \['state.k'\] beside its parameters' state .*, which were not saved"):
        shardferry.load_optimizer_state(model, resumed, tmp_path)
    report = shardferry.load_optimizer_state(model, resumed, tmp_path, keys="allow_missing")
    assert any("state.k" in warning for warning in report.warnings)
    assert int(resumed.state.get("k", 0)) == live


def test_a_key_that_the_optimizer_has_not_is_named(tmp_path: Path) -> None:
    _, optimizer = stepped(CountsInState, 3)
    save_alone({"optim": optimizer.state_dict()}, tmp_path)
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    other = torch.optim.SGD(model.parameters(), lr=0.125, momentum=0.5)
    with pytest.raises(InstallError, match=r"\['state.k'\] were saved with the optimizer, .* SGD has none of these"):
        shardferry.load_optimizer_state(model, other, tmp_path)
    assert not other.state
    report = shardferry.load_optimizer_state(model, other, tmp_path, keys="ignore_unexpected")
    assert any("state.k" in warning for warning in report.warnings)
    assert set(other.state) == set(model.parameters())


def test_a_key_of_another_shape_is_named(tmp_path: Path) -> None:
    _, optimizer = stepped(CountsInState, 3)
    optimizer.state["k"] = torch.zeros(2, dtype=torch.int64)
    save_alone({"optim": optimizer.state_dict()}, tmp_path)
    model, resumed = stepped(CountsInState, 1)
    with pytest.raises(
        InstallError, match=r"state.k: was saved as torch.int64 of the shape \(2,\), and CountsInState has"
    ):
        shardferry.load_optimizer_state(model, resumed, tmp_path)
    assert torch.equal(resumed.state["k"], torch.tensor([1]))


def test_what_two_optimizers_have_and_one_has_saved_is_refused(tmp_path: Path) -> None:
    """It was one's; both took it."""
    first, second = stepped(CountsBeside, 3), stepped(CountsBeside, 3)
    model = nn.ModuleDict({"first": first[0], "second": second[0]})
    named = {
        f"{half}.{name}": dict(optimizer.state[parameter])
        for half, (part, optimizer) in {"first": first, "second": second}.items()
        for name, parameter in part.named_parameters()
    }
    group = {name: value for name, value in first[1].param_groups[0].items() if name != "params"}
    saved = {"state": named, "param_groups": [{**group, "params": list(named)}], "total": 3}
    save_alone({"optim": saved}, tmp_path)
    optimizers = [CountsBeside(part.parameters(), lr=0.5) for part in model.values()]
    with pytest.raises(
        InstallError, match=r"has \['total'\], of no parameter; 2 of the optimizers given have it, and one"
    ):
        shardferry.load_optimizer_state(model, optimizers, tmp_path)
    assert [optimizer.total for optimizer in optimizers] == [0, 0]
    plain = torch.optim.SGD(model["second"].parameters(), lr=0.5)
    shardferry.load_optimizer_state(model, [optimizers[0], plain], tmp_path)
    assert optimizers[0].total == 3


def test_each_optimizer_gets_its_own_from_its_own_key(tmp_path: Path) -> None:
    saved = {"first": stepped(CountsBeside, 3), "second": stepped(CountsBeside, 2)}
    save_alone({name: optimizer.state_dict() for name, (_, optimizer) in saved.items()}, tmp_path)
    live = {name: stepped(CountsBeside, 0) for name in saved}
    models, optimizers = ({name: pair[i] for name, pair in live.items()} for i in (0, 1))
    shardferry.load_optimizer_state(models, optimizers, tmp_path)
    assert {name: optimizer.total for name, optimizer in optimizers.items()} == {"first": 3, "second": 2}
