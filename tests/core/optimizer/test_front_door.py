"""A load goes through the optimizer's own `load_state_dict`, and an error leaves everything as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import shardferry
from shardferry.errors import InstallError, LayoutError, PlanError
from tests.support.alone import save_alone

Checkpoint = Callable[..., str]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.ones(2, 4, dtype=next(net.parameters()).dtype)).sum().backward()
        optimizer.step()
    optimizer.zero_grad()


def adamw(net: nn.Module, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(net.parameters(), **{"lr": 0.1, **options})


@pytest.fixture
def saved(tmp_path: Path) -> Checkpoint:
    """Trains a model with an optimizer and saves its state under "optim"; gives the location."""

    def save(net: nn.Module, optimizer: torch.optim.Optimizer, name: str = "ckpt") -> str:
        train(net, optimizer)
        save_alone({"optim": get_optimizer_state_dict(net, optimizer)}, tmp_path / name)
        return str(tmp_path / name)

    return save


def picture(net: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """Everything that a load may change, copied."""
    return copy.deepcopy((net.state_dict(), optimizer.state_dict()))


def check_equal(one: Any, other: Any) -> None:
    """Dicts, lists, tensors, numbers and strings, bit for bit."""
    if isinstance(one, dict | list | tuple):
        assert type(one) is type(other)
        assert len(one) == len(other)
        pairs = ((one[k], other[k]) for k in one) if isinstance(one, dict) else zip(one, other, strict=True)
        for pair in pairs:
            check_equal(*pair)
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    else:
        assert one == other


class Packs(torch.optim.AdamW):
    """Saves its moments in one entry, as bitsandbytes does; takes them out when it loads."""

    def state_dict(self) -> dict[str, Any]:
        found = super().state_dict()
        packed = {
            key: {"packed": {n: v for n, v in entries.items() if n != "step"}, "step": entries["step"]}
            for key, entries in found["state"].items()
        }
        return {**found, "state": packed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = {k: {**e["packed"], "step": e["step"]} for k, e in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": state})


class Holds(torch.optim.Optimizer):
    """Keeps references to its state tensors and steps on these, as captured and offloading optimizers do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        self.held = []
        for p in self.param_groups[0]["params"]:
            self.state[p]["m"] = torch.zeros_like(p)
            self.held.append((p, self.state[p]["m"]))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p, m in self.held:
            m.add_(p.grad)
            p.data.sub_(m, alpha=self.param_groups[0]["lr"])


class RefusesLate(torch.optim.AdamW):
    """Raises after it has taken the state, but not in a trial."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        parameter = self.param_groups[0]["params"][0]
        self.state[parameter]["exp_avg"].zero_()
        if not parameter.is_meta:
            raise RuntimeError("too late")


class Counts(torch.optim.AdamW):
    """Keeps a counter of its own in its state dict, beside state and param groups."""

    count = 0

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "count": self.count, "scale": {"of": torch.tensor([float(self.count)])}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]
        super().load_state_dict(state_dict)


def test_what_a_state_dict_has_beside_state_and_groups(tmp_path: Path) -> None:
    net = model()
    one = Counts(net.parameters(), lr=0.1)
    train(net, one)
    one.count = 7
    save_alone({"optim": one.state_dict()}, tmp_path / "ckpt")
    two = Counts(net.parameters())
    report = shardferry.load_optimizer_state(net, two, tmp_path / "ckpt")
    assert two.count == 7
    assert report.warnings == ()
    save_alone({"optim": get_optimizer_state_dict(net, torch.optim.AdamW(net.parameters()))}, tmp_path / "without")
    with pytest.raises(InstallError, match=r"\['count', 'scale'\] beside state and param_groups, which were not saved"):
        shardferry.load_optimizer_state(net, two, tmp_path / "without")
    report = shardferry.load_optimizer_state(net, two, tmp_path / "without", keys="allow_missing")
    assert "['count', 'scale'] beside state and param_groups" in report.warnings[0]


@pytest.mark.parametrize("kind", [Packs, Holds, torch.optim.AdamW])
@pytest.mark.parametrize("has_stepped", [False, True])
def test_the_next_step_is_that_of_the_uninterrupted_run(kind: Any, has_stepped: bool, saved: Checkpoint) -> None:
    net, other = model(), model()
    one = kind(net.parameters())
    location = saved(net, one)
    other.load_state_dict(net.state_dict())
    two = kind(other.parameters())
    if has_stepped:
        train(other, two)
        other.load_state_dict(net.state_dict())
    shardferry.load_optimizer_state(other, two, location)
    check_equal(two.state_dict(), one.state_dict())
    train(net, one)
    train(other, two)
    check_equal(picture(other, two), picture(net, one))


def test_hooks_run_once(saved: Checkpoint) -> None:
    net, calls = model(), []
    location = saved(net, adamw(net))
    optimizer = adamw(net)
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("post"))
    optimizer.register_step_pre_hook(lambda *_: calls.append("step"))
    shardferry.load_optimizer_state(net, optimizer, location)
    assert calls == ["pre", "post"]


def test_live_state_is_filled_in_place(saved: Checkpoint) -> None:
    net = model()
    one = adamw(net)
    location = saved(net, one)
    two = adamw(net)
    train(net, two, steps=1)
    state, groups = two.state, two.param_groups
    group, tensors = groups[0], {p: dict(entries) for p, entries in state.items()}
    shardferry.load_optimizer_state(net, two, location)
    assert two.state is state
    assert two.param_groups is groups
    assert groups[0] is group
    assert all(state[p][name] is tensor for p, entries in tensors.items() for name, tensor in entries.items())
    check_equal(two.state_dict()["state"], one.state_dict()["state"])


def test_groups_that_share_one_rate_get_their_own(saved: Checkpoint) -> None:
    """torch gives a default that is a tensor to every group, as one object; it stays that where the saved rates are equal."""
    net = model()

    def two_groups() -> torch.optim.AdamW:
        return torch.optim.AdamW([{"params": part.parameters()} for part in net], lr=torch.tensor(0.125))

    one = two_groups()
    same = saved(net, one, "same")
    one.param_groups[1]["lr"] = torch.tensor(0.5)
    other = saved(net, one, "other")
    two = two_groups()
    rates = [group["lr"] for group in two.param_groups]
    assert rates[0] is rates[1]
    rates[0].fill_(9.0)
    shardferry.load_optimizer_state(net, two, same)
    assert all(group["lr"] is rates[0] for group in two.param_groups)
    assert float(rates[0]) == 0.125
    shardferry.load_optimizer_state(net, two, other)
    assert [float(group["lr"]) for group in two.param_groups] == [0.125, 0.5]


def test_parameters_that_share_one_step_get_their_own(saved: Checkpoint) -> None:
    """Those that are not loaded keep theirs."""
    net = model()
    one = adamw(net)
    location = saved(net, one)
    two = adamw(net)
    train(net, two, steps=1)
    shared = torch.tensor(9.0)
    for entries in two.state.values():
        entries["step"] = shared
    two.state[net[0].weight]["exp_avg"] = torch.zeros(4).expand(3, 4)
    shardferry.load_optimizer_state(net, two, location, exclude=["1.*"])
    assert [float(two.state[p]["step"]) for p in net.parameters()] == [2.0, 2.0, 9.0, 9.0]
    check_equal(two.state[net[0].weight], one.state[net[0].weight])


def test_an_expanded_buffer_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    """Several of its elements are one in memory: it can't be filled."""
    net = model()
    net.register_buffer("mask", torch.ones(2, 3))
    optimizer = adamw(net)
    train(net, optimizer)
    save_alone({"model": net.state_dict(), "optim": get_optimizer_state_dict(net, optimizer)}, tmp_path / "ckpt")
    other = model()
    other.register_buffer("mask", torch.zeros(3).expand(2, 3))
    fresh = adamw(other)
    before = picture(other, fresh)
    with pytest.raises(InstallError, match=r"mask: is an expanded tensor"):
        shardferry.load_optimizer_state(other, fresh, tmp_path / "ckpt", model_key="model")
    check_equal(picture(other, fresh), before)


def test_moments_keep_their_precision_beside_low_precision_weights(saved: Checkpoint) -> None:
    """torch's own load_state_dict rounds them to the dtype of the weights."""
    net = model()
    one = adamw(net)
    location = saved(net, one)
    low = model().bfloat16()
    two = adamw(low)
    for p in low.parameters():  # as an optimizer does that keeps its moments in float32
        two.state[p] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros(p.shape), "exp_avg_sq": torch.zeros(p.shape)}
    shardferry.load_optimizer_state(low, two, location)
    check_equal([e["exp_avg"] for e in two.state.values()], [e["exp_avg"] for e in one.state.values()])


def test_an_error_of_the_live_optimizer_is_undone(saved: Checkpoint) -> None:
    net = model()
    location = saved(net, adamw(net))
    optimizer = RefusesLate(net.parameters(), lr=0.5)
    train(net, optimizer, steps=1)
    before = picture(net, optimizer)
    held = dict(optimizer.state)
    with pytest.raises(InstallError, match=r"RefusesLate.load_state_dict raised RuntimeError: too late"):
        shardferry.load_optimizer_state(net, optimizer, location)
    check_equal(picture(net, optimizer), before)
    assert all(optimizer.state[p] is entries for p, entries in held.items())


def sgd(net: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)


def muon(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Muon([p for p in net.parameters() if p.ndim == 2], lr=0.5)


@pytest.mark.parametrize("has_stepped", [False, True])
@pytest.mark.parametrize(
    ("saver", "loader", "names"),
    [(adamw, sgd, "exp_avg.*SGD makes .*momentum_buffer"), (sgd, adamw, "momentum_buffer.*AdamW makes .*exp_avg")],
)
def test_another_optimizers_state_is_refused(
    saver: Any, loader: Any, names: str, has_stepped: bool, saved: Checkpoint
) -> None:
    net = model()
    location = saved(net, saver(net))
    optimizer = loader(net)
    if has_stepped:
        train(net, optimizer)
    before = picture(net, optimizer)
    with pytest.raises(InstallError, match=names):
        shardferry.load_optimizer_state(net, optimizer, location)
    check_equal(picture(net, optimizer), before)


def test_entries_that_only_one_side_has_go_by_policy(saved: Checkpoint) -> None:
    net = model()
    location = saved(net, adamw(net, amsgrad=True))
    live = {"hyperparameters": {"live": ["amsgrad"]}}
    with pytest.raises(InstallError, match=r"'max_exp_avg_sq' was saved, .*ignore_unexpected"):
        shardferry.load_optimizer_state(net, adamw(net), location, **live)
    report = shardferry.load_optimizer_state(net, adamw(net), location, keys="ignore_unexpected", **live)
    assert len(report.unexpected_entries) == 4
    shardferry.load_optimizer_state(net, adamw(net), location)  # with the saved amsgrad they are wanted
    plain = saved(net, adamw(net), "plain")
    optimizer = adamw(net, amsgrad=True)
    train(net, optimizer)
    with pytest.raises(InstallError, match=r"'max_exp_avg_sq' was not saved, .*allow_missing"):
        shardferry.load_optimizer_state(net, optimizer, plain, **live)
    kept = [e["max_exp_avg_sq"].clone() for e in optimizer.state.values()]
    report = shardferry.load_optimizer_state(net, optimizer, plain, keys="allow_missing", **live)
    assert len(report.missing_entries) == 4
    check_equal([e["max_exp_avg_sq"] for e in optimizer.state.values()], kept)


def test_the_dtype_of_state_is_predicted(saved: Checkpoint) -> None:
    net, low = model(), model().bfloat16()
    location = saved(net, adamw(net))
    optimizer = adamw(low)
    with pytest.raises(LayoutError, match=r"'exp_avg' was saved as torch\.float32 and is wanted as torch\.bfloat16"):
        shardferry.load_optimizer_state(low, optimizer, location)
    assert not optimizer.state
    shardferry.load_optimizer_state(low, optimizer, location, dtype="cast")
    assert {e["exp_avg"].dtype for e in optimizer.state.values()} == {torch.bfloat16}
    assert {e["step"].dtype for e in optimizer.state.values()} == {torch.float32}
    train(low, optimizer)


@pytest.mark.parametrize("split", ["one", "by layer", "one each"])
def test_groups_may_be_split_in_another_way(split: str, saved: Checkpoint) -> None:
    net = model()
    decay = [{"params": [p for p in net.parameters() if p.ndim == 2], "weight_decay": 0.1, "name": "weights"}]
    no_decay = [{"params": [p for p in net.parameters() if p.ndim == 1], "weight_decay": 0.0, "name": "biases"}]
    one = torch.optim.AdamW(decay + no_decay, lr=0.25)
    location = saved(net, one)
    groups = {
        "one": [list(net.parameters())],
        "by layer": [list(m.parameters()) for m in net],
        "one each": [[p] for p in net.parameters()],
    }
    two = torch.optim.AdamW([{"params": params} for params in groups[split]], lr=0.75, weight_decay=0.5)
    if split != "one each":
        with pytest.raises(InstallError, match=r"differ in 'weight_decay'.*hyperparameters: live"):
            shardferry.load_optimizer_state(net, two, location)
        assert not two.state
    report = shardferry.load_optimizer_state(net, two, location, hyperparameters={"live": ["weight_decay"]})
    assert {group["lr"] for group in two.param_groups} == {0.25}
    assert {group["weight_decay"] for group in two.param_groups} == {0.5}
    assert {(change.name, change.old, change.new) for change in report.overwritten} >= {("lr", 0.75, 0.25)}
    check_equal({p: two.state[p] for p in net.parameters()}, {p: one.state[p] for p in net.parameters()})


def test_live_hyperparameters_stay(saved: Checkpoint) -> None:
    net = model()
    location = saved(net, adamw(net, lr=0.1, weight_decay=0.1))
    two = adamw(net, lr=0.01, weight_decay=0.05)
    report = shardferry.load_optimizer_state(net, two, location, hyperparameters="live")
    assert (two.param_groups[0]["lr"], two.param_groups[0]["weight_decay"]) == (0.01, 0.05)
    assert report.overwritten == ()


@pytest.mark.parametrize(
    "lr",
    [np.float64(0.05), np.float32(0.05), torch.tensor(0.05), np.array(0.05)],
    ids=lambda value: type(value).__name__,
)
def test_hyperparameters_come_back_as_they_were(lr: Any, saved: Checkpoint) -> None:
    net = model()
    one = adamw(net)
    one.param_groups[0]["lr"] = lr
    location = saved(net, one)
    two = adamw(net)
    shardferry.load_optimizer_state(net, two, location)
    assert type(two.param_groups[0]["lr"]) is type(lr)
    assert two.param_groups[0]["lr"] == lr


class Mode:
    """A class of the training program's."""


def test_a_foreign_class_is_named_and_may_be_left_live(saved: Checkpoint) -> None:
    net = model()
    one = adamw(net)
    one.param_groups[0]["mode"] = Mode()
    location = saved(net, one)
    two = adamw(net)
    with pytest.raises(shardferry.ShardferryError, match=rf"mode.*{__name__}\.Mode.*not plain data") as caught:
        shardferry.load_optimizer_state(net, two, location)
    assert "\x1b" not in str(caught.value)
    assert not two.state
    report = shardferry.load_optimizer_state(net, two, location, keys="allow_missing")
    assert any("Mode" in warning for warning in report.warnings)
    assert "mode" not in two.param_groups[0]
    assert len(two.state) == 4
    shardferry.load_optimizer_state(net, two, location, safe_globals=[f"{__name__}.Mode"])
    assert type(two.param_groups[0]["mode"]) is Mode


class Lazily(torch.optim.Optimizer):
    """Makes whatever state ``make`` gives."""

    def __init__(self, params: Any, make: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        self.make = make

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            if p.grad is not None and not self.state[p]:
                self.state[p].update(self.make(p))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: {"buf": {0.5: torch.ones_like(p), 1: torch.ones_like(p), None: torch.ones(3)}},
        lambda p: {"pair": (torch.ones_like(p), torch.ones(2)), ("a", 1): torch.ones(2)},
        lambda p: {"v": torch.ones(2)},
        lambda p: {"count": torch.tensor(3), "name": "abc", "flag": True, "history": [torch.ones(2), torch.ones(3)]},
    ],
    ids=["keys of numbers", "tuples", "another shape", "all kinds"],
)
@pytest.mark.parametrize("has_stepped", [False, True])
def test_state_comes_back_in_its_form(make: Any, has_stepped: bool, saved: Checkpoint) -> None:
    net = model()
    one, two = Lazily(net.parameters(), make), Lazily(net.parameters(), make)
    location = saved(net, one)
    if has_stepped:
        train(net, two)
    shardferry.load_optimizer_state(net, two, location)
    for p in net.parameters():
        check_equal(dict(two.state[p]), dict(one.state[p]))


class Halves(nn.Linear):
    """Saves twice its weight, and halves it on loading."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self._register_state_dict_hook(lambda s, d, p, local: d.update({f"{p}weight": d[f"{p}weight"] * 2}))
        self._register_load_state_dict_pre_hook(lambda d, p, *_: d.update({f"{p}weight": d[f"{p}weight"] / 2}))


def test_weights_go_through_the_modules_own_code(tmp_path: Path) -> None:
    net, other = nn.Sequential(Halves(4, 3), nn.Linear(3, 2)), nn.Sequential(Halves(4, 3), nn.Linear(3, 2))
    save_alone({"model": net.state_dict()}, tmp_path / "ckpt")
    shardferry.load_model_state(other, tmp_path / "ckpt")
    check_equal(dict(other.named_parameters()), dict(net.named_parameters()))


def test_weights_alone_and_weights_from_another_directory(tmp_path: Path) -> None:
    net = model()
    one = adamw(net)
    train(net, one)
    save_alone({"optim": get_optimizer_state_dict(net, one)}, tmp_path / "optimizer")
    save_alone({"model": net.state_dict()}, tmp_path / "model")
    other = model()
    two = adamw(other)
    shardferry.load_model_state(other, tmp_path / "model")
    check_equal(other.state_dict(), net.state_dict())
    other = model()
    two = adamw(other)
    shardferry.load_optimizer_state(
        other, two, tmp_path / "optimizer", model_key="model", model_location=tmp_path / "model"
    )
    check_equal(picture(other, two), picture(net, one))
    third = model()
    before = picture(third, adamw(third))
    with pytest.raises(shardferry.ShardferryError, match="nothing is saved under model_key 'weights'"):
        shardferry.load_optimizer_state(
            third, adamw(third), tmp_path / "optimizer", model_key="weights", model_location=tmp_path / "model"
        )
    check_equal(picture(third, adamw(third)), before)


def test_models_with_optimizers_of_their_own(tmp_path: Path) -> None:
    nets = [model(), model()]
    optimizers = [adamw(nets[0], lr=0.1), adamw(nets[1], lr=0.2)]
    for steps, (net, optimizer) in enumerate(zip(nets, optimizers, strict=True), start=2):
        train(net, optimizer, steps)
    optim = {n: get_optimizer_state_dict(m, o) for n, m, o in zip("GD", nets, optimizers, strict=True)}
    save_alone(
        {"optim": optim, "model": {n: m.state_dict() for n, m in zip("GD", nets, strict=True)}}, tmp_path / "ckpt"
    )
    others = [model(), model()]
    fresh = [adamw(others[0]), adamw(others[1])]
    with pytest.raises(InstallError, match=r"0\.weight: two of the models given have a parameter of this name"):
        shardferry.load_optimizer_state(others, fresh, tmp_path / "ckpt", optimizer_key="optim.G")
    shardferry.load_optimizer_state(
        others,
        dict(zip("GD", fresh, strict=True)),
        tmp_path / "ckpt",
        optimizer_key={"G": "optim.G", "D": "optim.D"},
        model_key={"G": "model.G", "D": "model.D"},
    )
    for net, optimizer, other, one in zip(others, fresh, nets, optimizers, strict=True):
        check_equal(picture(net, optimizer), picture(other, one))
    again = [adamw(others[0]), adamw(others[1])]
    shardferry.load_optimizer_state(others, again, tmp_path / "ckpt", optimizer_key=["optim.G", "optim.D"])
    check_equal([o.state_dict() for o in again], [o.state_dict() for o in optimizers])


@pytest.mark.parametrize(
    ("selection", "names", "loaded"),
    [({"rename": {"G.*": "net.*"}}, ["net", "D"], [2, 2]), ({"include": ["G.*"]}, ["G", "D"], [2, 0])],
    ids=["rename", "include"],
)
def test_a_selection_that_is_about_one_of_several_optimizers(
    selection: dict[str, Any], names: list[str], loaded: list[int], tmp_path: Path
) -> None:
    """And one that is about none of them is refused."""

    def nets(*names: str) -> tuple[nn.ModuleDict, dict[str, torch.optim.Optimizer]]:
        parts = nn.ModuleDict({name: nn.Linear(4, 3) for name in names})
        return parts, {key: adamw(part) for key, part in zip("GD", parts.values(), strict=True)}

    parts, optimizers = nets("G", "D")
    for part, optimizer in zip(parts.values(), optimizers.values(), strict=True):
        train(part, optimizer)
    save_alone({key: get_optimizer_state_dict(parts, one) for key, one in optimizers.items()}, tmp_path / "ckpt")
    others, fresh = nets(*names)
    with pytest.raises(PlanError, match="fits none of the 4 saved names"):
        shardferry.load_optimizer_state(others, fresh, tmp_path / "ckpt", rename={"Q.*": "net.*"})
    shardferry.load_optimizer_state(others, fresh, tmp_path / "ckpt", **selection)
    assert [len(one.state) for one in fresh.values()] == loaded
    for one, saved_one in zip(fresh.values(), optimizers.values(), strict=True):
        if one.state:
            check_equal(list(one.state.values()), list(saved_one.state.values()))


@pytest.mark.parametrize("with_weights", [True, False])
def test_models_whose_parameters_of_one_name_have_other_shapes(tmp_path: Path, with_weights: bool) -> None:
    """The other model's weights don't tell a parameter's shape."""
    nets = {"actor": nn.Sequential(nn.Linear(4, 3)), "critic": nn.Sequential(nn.Linear(4, 1))}
    optimizers = {name: adamw(net, lr=0.1) for name, net in nets.items()}
    for name, net in nets.items():
        train(net, optimizers[name], 2)
    state = {name: get_optimizer_state_dict(net, optimizers[name]) for name, net in nets.items()}
    save_alone(state | {f"{name}_model": net.state_dict() for name, net in nets.items()}, tmp_path / "ckpt")
    others = {"actor": nn.Sequential(nn.Linear(4, 3)), "critic": nn.Sequential(nn.Linear(4, 1))}
    fresh = {name: adamw(net) for name, net in others.items()}
    model_key = {name: f"{name}_model" for name in nets} if with_weights else None
    shardferry.load_optimizer_state(others, fresh, tmp_path / "ckpt", model_key=model_key)
    check_equal([o.state_dict() for o in fresh.values()], [o.state_dict() for o in optimizers.values()])


def test_one_optimizer_for_each_parameter(tmp_path: Path) -> None:
    net = model()
    each = {name: torch.optim.AdamW([p], lr=0.25) for name, p in net.named_parameters()}
    net(torch.ones(2, 4)).sum().backward()
    for optimizer in each.values():
        optimizer.step()
    save_alone({"optim": {name: o.state_dict() for name, o in each.items()}}, tmp_path / "ckpt")
    same = {name: torch.optim.AdamW([p]) for name, p in net.named_parameters()}
    shardferry.load_optimizer_state(net, list(same.values()), tmp_path / "ckpt")
    one = adamw(net)
    shardferry.load_optimizer_state(net, one, tmp_path / "ckpt")
    for name, p in net.named_parameters():
        check_equal(same[name].state[p], each[name].state[p])
        check_equal(one.state[p], each[name].state[p])
    assert one.param_groups[0]["lr"] == 0.25


class Tied(nn.Module):
    """An embedding and a head, of one weight or of two."""

    def __init__(self, *, is_tied: bool) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        if is_tied:
            self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(x))


def tied_checkpoint(net: Tied, location: Path) -> torch.optim.AdamW:
    optimizer = adamw(net)
    net(torch.arange(6)).square().sum().backward()
    optimizer.step()
    save_alone({"optim": get_optimizer_state_dict(net, optimizer), "model": net.state_dict()}, location)
    return optimizer


def test_untied_state_for_a_tied_parameter_is_refused(tmp_path: Path) -> None:
    tied_checkpoint(Tied(is_tied=False), tmp_path / "ckpt")
    net = Tied(is_tied=True)
    before = picture(net, adamw(net))
    with pytest.raises(shardferry.ShardferryError, match=r"embedding\.weight and head\.weight are one \(tied\)"):
        shardferry.load_optimizer_state(net, adamw(net), tmp_path / "ckpt")
    with pytest.raises(InstallError, match=r"embedding\.weight and head\.weight are one .*different weights"):
        shardferry.load_model_state(net, tmp_path / "ckpt")
    check_equal(picture(net, adamw(net)), before)


@pytest.mark.parametrize("model_key", [None, "model"])
def test_tied_state_for_two_parameters_is_given_to_both(tmp_path: Path, model_key: str | None) -> None:
    one = tied_checkpoint(Tied(is_tied=True), tmp_path / "ckpt")
    net = Tied(is_tied=False)
    optimizer = adamw(net)
    rename = {"embedding.weight": ["embedding.weight", "head.weight"]}
    with pytest.raises(PlanError, match=r"rename: \{embedding.weight: \[embedding.weight, head.weight\]\}"):
        shardferry.load_optimizer_state(net, optimizer, tmp_path / "ckpt")
    shardferry.load_optimizer_state(net, optimizer, tmp_path / "ckpt", model_key=model_key, rename=rename)
    if model_key:
        assert torch.equal(net.head.weight, net.embedding.weight)
    expected = next(iter(one.state.values()))
    check_equal([dict(optimizer.state[p]) for p in net.parameters()], [expected, expected])


def test_globs_are_over_names_without_wrappers(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    one = adamw(net)
    train(net, one)
    state_dict = get_optimizer_state_dict(net, one)
    wrapped = {f"_orig_mod.{fqn}": entries for fqn, entries in state_dict["state"].items()}
    groups = [
        {**group, "params": [f"_orig_mod.{fqn}" for fqn in group["params"]]} for group in state_dict["param_groups"]
    ]
    save_alone({"optim": {"state": wrapped, "param_groups": groups}}, tmp_path / "ckpt")
    two = adamw(net)
    shardferry.load_optimizer_state(net, two, tmp_path / "ckpt", include=["1.*"])
    assert list(two.state) == list(net[1].parameters())
    check_equal([dict(two.state[p]) for p in net[1].parameters()], [dict(one.state[p]) for p in net[1].parameters()])
