"""The result that `shardferry.dcp` plans: the path of each saved value, and which tensors are sharded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from shardferry.checkpoint.from_torch import catalog_from_torch
from shardferry.dcp.targets import plan_result
from shardferry.errors import LayoutError, PlanError

Paths = dict[str, tuple[Any, ...]]


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Any]:
    """A process group of this process alone."""
    store = dist.FileStore(str(tmp_path / "rendezvous"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def plan(
    saved: dict[str, tuple[int, ...] | None], key: str, group: Any, *, paths: Any = None, model: Any = None
) -> tuple[Paths, set[str]]:
    """The planned paths, and the keys of what will be ShardedTensors.

    Args:
        saved: by key, a tensor's shape, or None for a Python object.
    """
    entries = {
        name: BytesStorageMetadata()
        if shape is None
        else TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size(shape), [])
        for name, shape in saved.items()
    }
    planned = plan_result(catalog_from_torch(Metadata(entries, paths), location="ckpt"), key, model or {}, group)
    targets = {target.key: target for target in planned.targets}
    assert targets.keys() == {name for name, shape in saved.items() if shape is not None} & planned.paths.keys()
    sharded = {
        name
        for name, target in targets.items()
        if type(target.result([torch.zeros(layout.local_shape) for layout in target.layouts])) is not torch.Tensor
    }
    return dict(planned.paths), sharded


PATHS = [
    pytest.param(
        {"optim.state.a.b.exp_avg": (4,), "model.a.b": (4,)},
        {"optim.state.a.b.exp_avg": ("optim", "state", "a.b", "exp_avg"), "model.a.b": ("model", "a.b")},
        {"optim.state.a.b.exp_avg": ("optim", "state", "a.b", "exp_avg")},
        id="recorded",
    ),
    pytest.param(
        {"optim.state.a.b.exp_avg": (4,), "optim.param_groups.a.b.lr": None},
        {
            "optim.state.a.b.exp_avg": ("optim", "state.a.b.exp_avg"),
            "optim.param_groups.a.b.lr": ("optim", "param_groups.a.b.lr"),
        },
        {
            "optim.state.a.b.exp_avg": ("optim", "state.a.b.exp_avg"),
            "optim.param_groups.a.b.lr": ("optim", "param_groups.a.b.lr"),
        },
        id="flattened",
    ),
    pytest.param(
        {"optim.state.a.b.exp_avg": (4,), "optim.state.a.b.inv.0": (4,), "optim.param_groups.a.b.lr": None},
        None,
        {
            "optim.state.a.b.exp_avg": ("optim", "state", "a.b", "exp_avg"),
            "optim.state.a.b.inv.0": ("optim", "state", "a.b", "inv", "0"),
            "optim.param_groups.a.b.lr": ("optim", "param_groups.a.b.lr"),
        },
        id="not-recorded",
    ),
    pytest.param({"optim": None}, None, {"optim": ("optim",)}, id="one-object"),
    pytest.param({"optim.other.x": (4,)}, None, {"optim.other.x": ("optim", "other.x")}, id="neither-state-nor-groups"),
    pytest.param(
        {"optim.state.exp_avg.a.b": (4,), "optim.state.step.a.b": None},
        None,
        {
            "optim.state.exp_avg.a.b": ("optim", "state", "a.b", "exp_avg"),
            "optim.state.step.a.b": ("optim", "state", "a.b", "step"),
        },
        id="megatron",
    ),
]


@pytest.mark.parametrize(("saved", "recorded", "expected"), PATHS)
def test_paths(group: Any, saved: Any, recorded: Any, expected: Paths) -> None:
    """As it was saved; nested by FQN and name where the writer did not record it."""
    assert plan(saved, "optim", group, paths=recorded)[0] == expected


def test_an_optimizer_that_was_saved_nested(group: Any) -> None:
    paths = {"app.optim.state.a.exp_avg": ("app", "optim", "state", "a", "exp_avg")}
    planned, sharded = plan({"app.optim.state.a.exp_avg": (4,)}, "app.optim", group, paths=paths)
    assert planned == {"app.optim.state.a.exp_avg": ("app.optim", "state", "a", "exp_avg")}
    assert sharded == planned.keys()


UNKNOWN = [
    pytest.param({"exp_avg": (4, 2), "exp_avg_sq": (4, 2), "step": ()}, {"exp_avg", "exp_avg_sq"}, id="adam"),
    pytest.param({"exp_avg": (4, 2), "mu_product": (), "scale": (1,)}, {"exp_avg"}, id="numbers"),
    pytest.param({"row": (4, 1), "col": (1, 2), "exp_avg": (4, 2)}, set(), id="shapes-disagree"),
    pytest.param({"exp_avg": (1,), "step": (1,)}, {"exp_avg"}, id="one-element"),
    pytest.param({"exp_avg": ()}, set(), id="scalar"),
]


@pytest.mark.parametrize(("state", "expected"), UNKNOWN)
def test_state_of_a_parameter_that_the_model_lacks(group: Any, state: Any, expected: set[str]) -> None:
    """It is sharded over the group if the state alone tells the parameter's shape."""
    _, sharded = plan({f"optim.state.a.{name}": shape for name, shape in state.items()}, "optim", group)
    assert sharded == {f"optim.state.a.{name}" for name in expected}


def test_tensors_that_are_no_state_are_whole(group: Any) -> None:
    saved = {"optim.param_groups.0.betas": (2,), "optim.other": (4, 2), "optim.state.a.exp_avg": (4, 2)}
    paths = {key: tuple(key.split(".")) for key in saved}
    assert plan(saved, "optim", group, paths=paths)[1] == {"optim.state.a.exp_avg"}


def test_a_wrong_key(group: Any) -> None:
    with pytest.raises(
        PlanError, match="nothing is saved under optimizer_key 'opt'; top-level keys are 'model', 'optim'"
    ):
        plan({"optim.state.a.exp_avg": (4,), "model.a": (4,)}, "opt", group)


def test_a_moment_of_another_shape(group: Any) -> None:
    """Even of a shape that a factor could have."""
    with pytest.raises(LayoutError, match=r"shape \(4,\), but the model's a has \(4, 2\); this checkpoint belongs"):
        plan({"optim.state.a.exp_avg": (4,)}, "optim", group, model={"a": torch.zeros(4, 2)})
