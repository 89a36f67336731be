"""Ranks that ask for different things: each gets what it asked for, or all raise; none waits, none has zeros."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

import shardferry
from shardferry.errors import ShardferryError
from tests.support.models import Model
from tests.support.oracle import full_tensor
from tests.support.range_server import served
from tests.support.ranks import RankPool

SHAPES = {"a.weight": (48, 64), "b.weight": (3, 5), "c.weight": (7, 2)}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)


def save(path: str) -> None:
    """Under two keys: all parameters, and the first one alone."""
    full = {fqn: full_tensor(fqn, "momentum_buffer", shape) for fqn, shape in SHAPES.items()}
    state = {fqn: {"momentum_buffer": tensor} for fqn, tensor in full.items()}
    first = {"a.weight": state["a.weight"]}
    saved = {"optim": state, "one": first, "other": first}
    groups = {key: [{"lr": 0.5, "momentum": 0.9, "params": list(of)}] for key, of in saved.items()}
    dcp.save({key: {"state": of, "param_groups": groups[key]} for key, of in saved.items()}, checkpoint_id=path)


def load(path: str, each: Sequence[Mapping[str, Any]]) -> str | list[str]:
    """With this rank's own keywords; the parameters whose state is what was saved, or the error."""
    own = dict(each[dist.get_rank()])
    names, keys = own.pop("names", list(SHAPES)), own.pop("optimizers", None)
    models = [Model({fqn: SHAPES[fqn] for fqn in names}) for _ in keys or [0]]
    optimizers = list(map(sgd, models))
    optimizer: Any = optimizers[0] if keys is None else dict(zip(keys, optimizers, strict=True))
    try:
        shardferry.load_optimizer_state(models, optimizer, path, load_s=30, **own)
    except ShardferryError as error:
        assert not any(one.state for one in optimizers)
        return f"{type(error).__name__}: {error}"
    found = []
    for model, one in zip(models, optimizers, strict=True):
        for fqn, parameter in model.named_parameters():
            if parameter in one.state:
                expected = full_tensor(fqn, "momentum_buffer", SHAPES[fqn])
                assert torch.equal(one.state[parameter]["momentum_buffer"], expected), fqn
                found.append(fqn)
    return found


@pytest.fixture(scope="module")
def saved(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("disagree") / "ckpt")
    ranks.run(1, save, path)
    return path


ONE = {"names": ["a.weight"], "optimizer_key": "one"}
BOTH = {"names": ["a.weight"], "optimizers": ["one", "other"]}


@pytest.mark.parametrize(
    ("each", "message"),
    [
        pytest.param(
            [{**ONE, "strategy": "auto"}, {**ONE, "strategy": "cooperative"}], "dividing the reads", id="strategies"
        ),
        pytest.param([BOTH, {**BOTH, "optimizers": ["other", "one"]}], "optimizer_key", id="another order"),
        pytest.param([BOTH, {**BOTH, "optimizers": ["one"]}], "optimizer_key", id="fewer optimizers"),
        pytest.param(
            [{"names": ["a.weight"], "keys": "ignore_unexpected"}, {"names": ["a.weight"]}],
            "b.weight: is saved in",
            id="unexpected keys are one rank's error",
        ),
    ],
)
def test_all_ranks_raise(saved: str, each: list[dict[str, Any]], message: str, ranks: RankPool) -> None:
    for outcome in ranks.run(2, load, saved, each):
        assert isinstance(outcome, str), "loaded"
        assert message in outcome


def test_ranks_that_split_chunks_in_other_ways(saved: str, ranks: RankPool) -> None:
    with served(Path(saved)) as server:
        outcomes = ranks.run(2, load, server.url, [{"max_request": 2048}, {"max_request": 1024}])
    assert all("SpecError: dividing the reads" in outcome for outcome in outcomes)


@pytest.mark.parametrize("strategy", ["direct", "cooperative"])
def test_each_rank_may_exclude_its_own(saved: str, strategy: str, ranks: RankPool) -> None:
    each = [
        {"exclude": ["a.*"], "strategy": strategy},
        {"names": ["a.weight", "b.weight"], "strategy": strategy},  # only rank 0 takes c.weight
    ]
    assert ranks.run(2, load, saved, each) == [["b.weight", "c.weight"], ["a.weight", "b.weight"]]
