"""Wrappers of modules and of optimizers: tests/programs has the ones of Accelerate, Lightning and torchtitan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import shardferry
from shardferry.errors import InstallError
from shardferry.optimizer.wrappers import FqnCleaner, torch_optimizers
from tests.support.alone import save_alone


class Wrapper(torch.optim.Optimizer):
    """Shows another's state as its own."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def state(self):
        return self.optimizer.state

    @property
    def param_groups(self):
        return self.optimizer.param_groups


class Lookahead(torch.optim.Optimizer):
    """Trains the same parameters as another, with state of its own."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer.param_groups, {})
        self.optimizer = optimizer


class Container(torch.optim.Optimizer):
    """One for several."""

    def __init__(self, parameters: list[nn.Parameter], optimizers: list[torch.optim.Optimizer]) -> None:
        super().__init__(parameters, {})
        self.optimizers = optimizers


def parameters(count: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2)) for _ in range(count)]


@pytest.mark.parametrize(
    ("ddp_prefixes", "name", "fqn"),
    [
        pytest.param((), "layers.0.weight", "layers.0.weight", id="plain"),
        pytest.param((), "module.weight", "module.weight", id="a-module-of-the-model"),
        pytest.param(("module.",), "module.module.weight", "module.weight", id="ddp-over-a-module-of-the-model"),
        pytest.param(("head.module.",), "head.module.weight", "head.weight", id="ddp-inside"),
        pytest.param(("head.module.",), "tail.module.weight", "tail.module.weight", id="ddp-elsewhere"),
        pytest.param(("module.head.module.", "module."), "module.head.module.bias", "head.bias", id="ddp-in-ddp"),
        pytest.param((), "_orig_mod.layers.0._checkpoint_wrapped_module.weight", "layers.0.weight", id="compiled"),
        pytest.param((), "_fsdp_wrapped_module.a._fsdp_wrapped_module.b", "a.b", id="fsdp1"),
        pytest.param((), "_forward_module.weight", "weight", id="fabric"),
        pytest.param(("_orig_mod.module.",), "_orig_mod.module.weight", "weight", id="compiled-ddp"),
    ],
)
def test_names_without_what_wrappers_add(ddp_prefixes: tuple[str, ...], name: str, fqn: str) -> None:
    assert FqnCleaner(ddp_prefixes).clean(name) == fqn


def test_a_module_that_is_called_module_is_not_a_wrapper() -> None:
    model = nn.ModuleDict({"module": nn.Linear(2, 2)})
    fqns = FqnCleaner.for_model(model)
    assert [fqns.clean(name) for name, _ in model.named_parameters()] == ["module.weight", "module.bias"]


def test_an_optimizer_stands_for_itself() -> None:
    optimizer = torch.optim.AdamW(parameters(1))
    assert torch_optimizers(optimizer) == (optimizer,)


def test_wrappers_are_taken_off() -> None:
    optimizer = torch.optim.AdamW(parameters(1))
    assert torch_optimizers(Wrapper(Wrapper(optimizer))) == (optimizer,)


@pytest.mark.parametrize("attribute", ["optim", "optimizer", "base", "base_optimizer", "_optimizer"])
def test_an_optimizer_around_another_with_state_of_its_own_is_refused(attribute: str) -> None:
    outer = Lookahead(torch.optim.AdamW(parameters(1)))
    setattr(outer, attribute, vars(outer).pop("optimizer"))
    with pytest.raises(InstallError, match=rf"Lookahead owns another optimizer .*, {attribute} \(AdamW\)"):
        torch_optimizers(outer)


def test_what_is_no_optimizer_is_refused() -> None:
    with pytest.raises(InstallError, match=r"builtins\.dict is not a torch\.optim\.Optimizer"):
        torch_optimizers({})  # type: ignore[arg-type]


def test_a_container_stands_for_its_members() -> None:
    one, other = parameters(2)
    members = [torch.optim.AdamW([one]), torch.optim.SGD([other])]
    container = Container([one, other], [Wrapper(members[0]), members[1]])
    assert torch_optimizers(container) == tuple(members)


def test_a_container_that_trains_more_than_its_members_is_refused() -> None:
    one, other = parameters(2)
    container = Container([one, other], [torch.optim.AdamW([one])])
    with pytest.raises(InstallError, match="Container owns another optimizer"):
        torch_optimizers(container)


def test_members_of_a_container_get_their_own_state(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    saved = torch.optim.AdamW([{"params": [model.weight], "lr": 0.5}, {"params": [model.bias], "lr": 0.25}])
    model(torch.ones(1, 3)).sum().backward()
    saved.step()
    save_alone({"optim": get_optimizer_state_dict(model, saved)}, tmp_path / "ckpt")
    members = [torch.optim.AdamW([model.weight]), torch.optim.AdamW([model.bias])]
    container = Container([model.weight, model.bias], members)
    shardferry.load_optimizer_state(model, container, tmp_path / "ckpt")
    for member, parameter, lr in zip(members, model.parameters(), (0.5, 0.25), strict=True):
        assert list(member.state) == [parameter]
        assert torch.equal(member.state[parameter]["exp_avg"], saved.state[parameter]["exp_avg"])
        assert member.param_groups[0]["lr"] == lr
    assert not container.state
