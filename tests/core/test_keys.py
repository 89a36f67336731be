"""What fits and what doesn't: names, positions, missing and unexpected parameters, dtypes; strict unless asked otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

import shardferry
from shardferry.config import Renaming
from shardferry.errors import InstallError, LayoutError, PlanError, SpecError
from shardferry.plan.match_keys import KeyReport
from tests.support.alone import save_alone
from tests.support.models import fsdp1
from tests.support.oracle import full_tensor
from tests.support.ranks import RankPool
from tests.support.small_net import NAMES, Net, adamw, check, fill, save


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = Net()
    return save(tmp_path_factory.mktemp("keys") / "ckpt", *fill(model, adamw(model)))


# --- positions -------------------------------------------------------------------------------------------------------


def save_plain(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """As many do: ``optimizer.state_dict()``, whose parameters are numbers."""
    save_alone({"optim": optimizer.state_dict()}, path)
    return str(path)


@pytest.mark.defect("B7")
@pytest.mark.conformance(9)
def test_saved_by_position(tmp_path: Path) -> None:
    model = Net()
    path = save_plain(tmp_path / "ckpt", *fill(model, adamw(model)))
    other = Net()
    optimizer = adamw(other, lr=9.0)
    shardferry.load_optimizer_state(other, optimizer, path)
    check(other, optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 1.0]


def test_saved_by_position_for_another_optimizer(tmp_path: Path) -> None:
    model = Net()
    path = save_plain(tmp_path / "ckpt", *fill(model, adamw(model)))
    other = Net()
    with pytest.raises(
        PlanError, match=r"saved by position .* have \[3, 3\] parameters, those of the live optimizer \[6\]"
    ):
        shardferry.load_optimizer_state(other, torch.optim.AdamW(other.parameters()), path)


def test_names_of_the_saved_groups_decide(tmp_path: Path) -> None:
    """Optimizers made from named parameters save the names too: then the order does not matter."""
    model = Net()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.5)
    path = save_plain(tmp_path / "ckpt", *fill(model, optimizer))
    other = Net(NAMES[::-1])
    resumed = torch.optim.AdamW(other.parameters())
    shardferry.load_optimizer_state(other, resumed, path)
    check(other, resumed)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rename", "to_saved"),
    [
        pytest.param({"first.*": "a.*", "second.*": "b.*"}, {"a": "first", "b": "second", "third": "third"}, id="some"),
        pytest.param({"*": "net.*"}, {f"net.{name}": name for name in NAMES}, id="prefix"),
        pytest.param({"third.weight": "third.weight", "t*d.*": "x.*.*"}, None, id="exact-and-two-stars"),
    ],
)
def test_rename(saved: str, rename: dict[str, str], to_saved: dict[str, str] | None) -> None:
    if to_saved is None:
        rename, to_saved = {"first.*": "f.*"}, {"f": "first", "second": "second", "third": "third"}
    nested = any(name.startswith("net.") for name in to_saved)
    model: nn.Module = nn.ModuleDict({"net": Net()}) if nested else Net(tuple(to_saved))

    def saved_name(fqn: str) -> str:
        module, _, leaf = fqn.rpartition(".")
        return f"{to_saved[module]}.{leaf}"

    optimizer = adamw(model)
    shardferry.load_optimizer_state(model, optimizer, saved, rename=rename)
    check(model, optimizer, saved_name)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch.compile's own
def test_wrappers_names_are_dropped_on_both_sides(tmp_path: Path) -> None:
    """The live side needs no renaming; names that were saved with a wrapper's prefix do."""
    model = Net()
    model, optimizer = fill(model, adamw(model))
    state = optimizer.state_dict()
    order = [n for suffix in ("weight", "bias") for n, _ in model.named_parameters() if n.endswith(suffix)]
    named = {
        "state": {f"_orig_mod.{order[i]}": values for i, values in state["state"].items()},
        "param_groups": [
            {**g, "params": [f"_orig_mod.{order[i]}" for i in g["params"]]} for g in state["param_groups"]
        ],
    }
    save_alone({"optim": named}, tmp_path / "ckpt")
    other: Any = torch.compile(Net())
    resumed = adamw(other)
    shardferry.load_optimizer_state(other, resumed, tmp_path / "ckpt", rename={"_orig_mod.*": "*"})
    check(other._orig_mod, resumed)


def test_renamings_that_mean_nothing(saved: str) -> None:
    with pytest.raises(SpecError, match=r"'a\.\*\.\*' has 2 stars, 'b\.\*' has 1"):
        Renaming("a.*.*", "b.*")
    model = Net()
    with pytest.raises(PlanError, match="two saved parameters get this name"):
        shardferry.load_optimizer_state(model, adamw(model), saved, rename={"second.*": "first.*"})


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        pytest.param(
            {"rename": {"frist.*": "f.*"}}, r"rename: 'frist\.\*' fits none of the 6 saved names", id="rename"
        ),
        pytest.param(
            {"include": ["frist.*"]}, r"include: 'frist\.\*' fits none of .* nearest are first\.", id="include"
        ),
        pytest.param({"exclude": ["*"]}, r"exclude \['\*'\] leave none of the 6 saved names", id="exclude"),
        pytest.param(
            {"model_key": "optim"}, r"model_key 'optim' there is nothing but the optimizer's own", id="model_key"
        ),
    ],
)
def test_what_is_about_nothing_saved_is_refused(saved: str, asked: dict[str, Any], message: str) -> None:
    model = Net()
    with pytest.raises(PlanError, match=message):
        shardferry.load_optimizer_state(model, adamw(model), saved, **asked)


def test_one_glob_in_place_of_a_list(saved: str) -> None:
    """As a sequence of globs its letters would be some, and its star all."""
    model = Net()
    with pytest.raises(SpecError, match=r"include: 'first\.\*' is one string; give a list"):
        shardferry.load_optimizer_state(model, adamw(model), saved, include="first.*")


def test_weights_on_the_top_level_beside_the_optimizer(tmp_path: Path) -> None:
    """As torchtitan saves them."""
    model = Net()
    model, optimizer = fill(model, adamw(model))
    save_alone({**get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}, tmp_path / "ckpt")
    other = Net()
    shardferry.load_optimizer_state(other, adamw(other), tmp_path / "ckpt", model_key="")
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))


def test_include_and_exclude_leave_the_rest_alone(saved: str) -> None:
    model = Net()
    optimizer = adamw(model)
    before = {"step": torch.tensor(1.0), "exp_avg": torch.ones(3, 4), "exp_avg_sq": torch.ones(3, 4)}
    optimizer.state[model.third.weight] = before
    shardferry.load_optimizer_state(model, optimizer, saved, include=["*.weight"], exclude=["third.*"])
    assert optimizer.state[model.third.weight] is before
    assert set(optimizer.state) == {model.first.weight, model.second.weight, model.third.weight}
    expected = full_tensor("first.weight", "exp_avg", (3, 4))
    assert torch.equal(optimizer.state[model.first.weight]["exp_avg"], expected)


# --- missing, unexpected, mismatched ---------------------------------------------------------------------------------


def test_a_parameter_that_was_added(saved: str) -> None:
    model = Net((*NAMES, "fourth"))
    optimizer = adamw(model, lr=9.0)
    with pytest.raises(
        PlanError, match=r"fourth\.weight: the checkpoint has no state .* \(2 of 8 wanted parameters are missing"
    ):
        shardferry.load_optimizer_state(model, optimizer, saved)
    assert not optimizer.state
    report = shardferry.load_optimizer_state(model, optimizer, saved, keys="allow_missing")
    assert report == KeyReport(missing=("fourth.weight", "fourth.bias"), unexpected=())
    assert model.fourth.weight not in optimizer.state
    assert len(optimizer.state) == 6


def test_a_parameter_that_was_removed(saved: str) -> None:
    model = Net(NAMES[:2])
    optimizer = adamw(model)
    with pytest.raises(
        PlanError, match=r"third\.bias: is saved in .*, but no rank wants it \(2 of 6 saved names are unexpected"
    ):
        shardferry.load_optimizer_state(model, optimizer, saved)
    assert not optimizer.state
    report = shardferry.load_optimizer_state(model, optimizer, saved, keys="ignore_unexpected")
    assert report == KeyReport(missing=(), unexpected=("third.bias", "third.weight"))
    check(model, optimizer)


def test_another_model(saved: str) -> None:
    """All that doesn't fit is told at once, and nothing is loaded."""
    model = Net((*NAMES[:2], "other"), width=5)
    optimizer = adamw(model)
    with pytest.raises(
        LayoutError,
        match=r"first\.weight: the model's parameter has the shape \(3, 5\), the saved one \(3, 4\).*are mismatched",
    ):
        shardferry.load_optimizer_state(model, optimizer, saved, keys=["allow_missing", "ignore_unexpected"])
    assert not optimizer.state


def test_policies_that_are_none(saved: str) -> None:
    model = Net()
    with pytest.raises(SpecError, match="keys: 'lenient' is not one of"):
        shardferry.load_optimizer_state(model, adamw(model), saved, keys="lenient")
    with pytest.raises(SpecError, match="strict goes with no other policy"):
        shardferry.load_optimizer_state(model, adamw(model), saved, keys=["strict", "allow_missing"])
    with pytest.raises(SpecError, match="strategy: 'shared' is not one of auto, direct, cooperative"):
        shardferry.load_optimizer_state(model, adamw(model), saved, strategy="shared")
    with pytest.raises(SpecError, match="dtype: 'convert' is not one of"):
        shardferry.load_optimizer_state(model, adamw(model), saved, dtype="convert")


# --- partly initialised, frozen, tied ------------------------------------------------------------------------------------


def partly(model: nn.Module, optimizer: torch.optim.Optimizer, without: str) -> dict[str, Any]:
    """A named state dict in which one parameter has never stepped."""
    whole = get_optimizer_state_dict(model, optimizer)
    return {**whole, "state": {fqn: state for fqn, state in whole["state"].items() if fqn != without}}


@pytest.mark.parametrize("frozen", [False, True], ids=["never-stepped", "frozen"])
def test_parameters_without_state(tmp_path: Path, frozen: bool) -> None:
    model = Net()
    save_alone({"optim": partly(*fill(model, adamw(model)), without="second.weight")}, tmp_path / "ckpt")
    other = Net()
    other.second.weight.requires_grad_(not frozen)
    optimizer = adamw(other, lr=9.0)
    optimizer.state[other.second.weight] = {"step": torch.tensor(1.0)}
    shardferry.load_optimizer_state(other, optimizer, tmp_path / "ckpt")
    assert other.second.weight not in optimizer.state, "what never stepped starts anew"
    assert len(optimizer.state) == 5
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 1.0]


def test_a_frozen_parameter_that_was_never_saved(saved: str) -> None:
    model = Net((*NAMES, "fourth"))
    model.fourth.requires_grad_(False)
    optimizer = adamw(model)
    assert shardferry.load_optimizer_state(model, optimizer, saved) == KeyReport((), ())
    assert len(optimizer.state) == 6


def test_state_of_a_parameter_that_is_frozen_now_is_kept(saved: str) -> None:
    model = Net()
    model.first.requires_grad_(False)
    optimizer = adamw(model)
    shardferry.load_optimizer_state(model, optimizer, saved)
    check(model, optimizer)


def tied(first: str) -> nn.Module:
    """Two names for one weight; which of them comes first differs."""
    model = nn.Module()
    layers = {"embedding": nn.Linear(4, 3, bias=False), "head": nn.Linear(4, 3, bias=False)}
    layers["head"].weight = layers["embedding"].weight
    for name in sorted(layers, key=lambda n: n != first):
        model.add_module(name, layers[name])
    return model


@pytest.mark.parametrize(
    ("source", "target"), [("embedding", "embedding"), ("embedding", "head"), ("head", "embedding")]
)
def test_tied_parameters(tmp_path: Path, source: str, target: str) -> None:
    model = tied(source)
    path = save(tmp_path / "ckpt", *fill(model, torch.optim.AdamW(model.parameters(), lr=0.5)))
    other = tied(target)
    with torch.no_grad():
        other.head.weight.zero_()
    optimizer = torch.optim.AdamW(other.parameters())
    shardferry.load_optimizer_state(other, optimizer, path, model_key="model")
    expected = full_tensor(f"{source}.weight", "exp_avg", (3, 4))
    assert torch.equal(optimizer.state[other.head.weight]["exp_avg"], expected)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert torch.equal(other.head.weight, model.head.weight)


def load_tied_fsdp1(path: str, use_orig_params: bool) -> list[torch.Tensor]:
    """This rank's slices of a moment and of the weight."""
    model = fsdp1(tied("head"), use_orig_params=use_orig_params)
    (parameter,) = model.parameters()
    with torch.no_grad():
        parameter.zero_()
    optimizer = torch.optim.AdamW(model.parameters())
    shardferry.load_optimizer_state(model, optimizer, path, model_key="model")
    assert optimizer.param_groups[0]["lr"] == 0.5
    return [optimizer.state[parameter]["exp_avg"].clone(), parameter.detach().clone()]


@pytest.mark.parametrize("use_orig_params", [False, True], ids=["flat", "orig"])
def test_tied_parameters_of_fsdp1(ranks: RankPool, tmp_path: Path, use_orig_params: bool) -> None:
    model = tied("embedding")
    path = save(tmp_path / "ckpt", *fill(model, torch.optim.AdamW(model.parameters(), lr=0.5)))
    slices = ranks.run(2, load_tied_fsdp1, path, use_orig_params)
    moment, weight = (torch.cat(parts).view(3, 4) for parts in zip(*slices, strict=True))
    assert torch.equal(moment, full_tensor("embedding.weight", "exp_avg", (3, 4)))
    assert torch.equal(weight, model.head.weight)


# --- dtypes --------------------------------------------------------------------------------------------------------------


@pytest.mark.defect("B8")
@pytest.mark.conformance(11)
def test_dtype_policy(saved: str) -> None:
    model = Net().to(torch.bfloat16)
    optimizer = adamw(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = optimizer.state[model.first.weight]
    with pytest.raises(
        LayoutError,
        match=r"first\.weight: 'exp_avg' was saved as torch\.float32 and is wanted as torch\.bfloat16; .* dtype: cast",
    ):
        shardferry.load_optimizer_state(model, optimizer, saved)
    assert optimizer.state[model.first.weight] is state
    shardferry.load_optimizer_state(model, optimizer, saved, dtype="cast")
    found = optimizer.state[model.first.weight]["exp_avg"]
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, full_tensor("first.weight", "exp_avg", (3, 4)).to(torch.bfloat16))
    assert optimizer.state[model.first.weight]["step"].dtype is torch.float32


def test_a_cast_that_would_lose_the_numbers(saved: str) -> None:
    model = Net()
    optimizer = adamw(model)
    optimizer.state[model.first.weight] = {"exp_avg": torch.zeros(3, 4, dtype=torch.int8)}
    with pytest.raises(LayoutError, match=r"wanted as torch\.int8; a cast between these would lose the numbers"):
        shardferry.load_optimizer_state(model, optimizer, saved, dtype="cast")


def test_weights_have_the_dtype_of_the_model(saved: str) -> None:
    model = Net().to(torch.float16)
    with pytest.raises(LayoutError, match=r"'exp_avg' was saved as torch\.float32 and is wanted as torch\.float16"):
        shardferry.load_optimizer_state(model, adamw(model), saved)
    with pytest.raises(LayoutError, match=r"the weight was saved as torch\.float32 and is wanted as torch\.float16"):
        shardferry.load_model_state(model, saved, model_key="model")
    shardferry.load_optimizer_state(model, adamw(model), saved, model_key="model", dtype="cast")


# --- weights -------------------------------------------------------------------------------------------------------------


class WithBuffers(nn.Module):
    """Everything that a state dict can hold."""

    def __init__(self, extra: str) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.linear = nn.Linear(4, 3)
        self.register_buffer("table", torch.zeros(5, 2))
        self.register_buffer("scratch", torch.zeros(7), persistent=False)
        self.extra = extra

    def get_extra_state(self) -> str:
        return self.extra

    def set_extra_state(self, state: str) -> None:
        self.extra = state


def test_weights_buffers_and_extra_state(tmp_path: Path) -> None:
    model = WithBuffers("saved")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tensor.data.copy_(full_tensor(name, "weight", tensor.shape))
    path = save(tmp_path / "ckpt", *fill(model, torch.optim.AdamW(model.parameters())))
    other = WithBuffers("other")
    optimizer = torch.optim.AdamW(other.parameters())
    shardferry.load_optimizer_state(other, optimizer, path, model_key="model")
    assert other.extra == "saved"
    for (name, mine), theirs in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(torch.as_tensor(mine == theirs), torch.ones_like(torch.as_tensor(mine == theirs))), name
    assert not other.scratch.any()


def test_weights_that_are_missing_or_unexpected(saved: str) -> None:
    model = Net((*NAMES, "fourth"))
    optimizer = adamw(model)
    with pytest.raises(PlanError, match=r"fourth\.weight"):
        shardferry.load_optimizer_state(model, optimizer, saved, model_key="model")
    before = model.fourth.weight.detach().clone()
    report = shardferry.load_optimizer_state(model, optimizer, saved, model_key="model", keys="allow_missing")
    assert set(report.missing) == {"fourth.weight", "fourth.bias"}
    assert torch.equal(model.fourth.weight, before)
    with pytest.raises(
        PlanError, match="nothing is saved under model_key 'modle'; top-level keys are 'model', 'optim'"
    ):
        shardferry.load_optimizer_state(model, optimizer, saved, model_key="modle")


# --- several optimizers, nested keys ---------------------------------------------------------------------------------------


def test_an_optimizer_that_is_nested_deeper(tmp_path: Path) -> None:
    model = Net()
    state = get_optimizer_state_dict(*fill(model, adamw(model)))
    save_alone({"app": {"optimizers": [state]}}, tmp_path / "ckpt")
    other = Net()
    optimizer = adamw(other)
    shardferry.load_optimizer_state(other, optimizer, tmp_path / "ckpt", optimizer_key="app.optimizers.0")
    check(other, optimizer)


def test_an_optimizer_that_is_the_whole_checkpoint(tmp_path: Path) -> None:
    model = Net()
    save_alone(get_optimizer_state_dict(*fill(model, adamw(model))), tmp_path / "ckpt")
    other = Net()
    optimizer = adamw(other)
    shardferry.load_optimizer_state(other, optimizer, tmp_path / "ckpt", optimizer_key="")
    check(other, optimizer)


def test_several_optimizers_of_several_parts(saved: str) -> None:
    """Saved as one: loaded into two parts of a model, each with an optimizer of its own."""
    parts = [Net(NAMES[:1]), Net(NAMES[1:])]
    optimizers = [adamw(part) for part in parts]
    shardferry.load_optimizer_state(parts, optimizers, saved)
    for part, optimizer in zip(parts, optimizers, strict=True):
        check(part, optimizer)


def test_scheduler_keys_survive(tmp_path: Path) -> None:
    model = Net()
    model, optimizer = fill(model, adamw(model))
    torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)
    optimizer.param_groups[1]["tag"] = {"decay": [1, 2.5, "x"]}
    path = save(tmp_path / "ckpt", model, optimizer)
    other = Net()
    resumed = adamw(other, lr=9.0)
    shardferry.load_optimizer_state(other, resumed, path)
    assert [group["initial_lr"] for group in resumed.param_groups] == [0.5, 1.0]
    assert resumed.param_groups[1]["tag"] == {"decay": [1, 2.5, "x"]}


def test_an_optimizer_of_another_model_is_refused(saved: str) -> None:
    with pytest.raises(InstallError, match="is not a parameter of the model"):
        shardferry.load_optimizer_state(Net(), adamw(Net()), saved)
