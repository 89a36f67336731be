"""State that one rank alone has saved, under the name of the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import shardferry
from shardferry.checkpoint.catalog import SavedTensor
from shardferry.plan.saved_parts import local_part_names
from shardferry.plan.state_of_param import StateOfParam
from tests.support.ranks import RankPool

Shape = tuple[int, ...]


def saved(shape: Shape, dtype: torch.dtype = torch.float32, num_chunks: int = 1) -> SavedTensor:
    return SavedTensor("key", shape, dtype, range(num_chunks), 0)


def matrix(entries: dict[str, SavedTensor], *parts: Shape) -> StateOfParam:
    return StateOfParam(entries, (8, 4), frozenset(parts))


@pytest.mark.parametrize(
    ("params", "names"),
    [
        pytest.param({"a": matrix({"m": saved((4, 4)), "v": saved((4, 4))}, (4, 4))}, {"m", "v"}, id="one rank's part"),
        pytest.param({"a": matrix({"m": saved((8, 4), num_chunks=2)}, (4, 4))}, set(), id="the whole"),
        pytest.param({"a": matrix({"m": saved((4, 4), num_chunks=2)}, (4, 4))}, set(), id="a sharded factor"),
        pytest.param({"a": matrix({"m": saved((2, 4))}, (4, 4))}, set(), id="a factor of another shape"),
        pytest.param({"a": matrix({"m": saved((4, 4))})}, set(), id="not sharded"),
        pytest.param({"a": matrix({"step": saved((4, 4))}, (4, 4))}, set(), id="step"),
        pytest.param(
            {
                "a": matrix({"m": saved((4, 4))}, (4, 4)),
                "b": StateOfParam({"m": saved((4,), num_chunks=2)}, (4,), frozenset({(2,)})),
            },
            set(),
            id="a factor that happens to have a part's shape",
        ),
        pytest.param(
            {"a": matrix({"m": saved((4, 4))}, (4, 4)), "b": StateOfParam({"m": saved((4,))}, (4,), frozenset())},
            {"m"},
            id="beside a parameter that is not sharded",
        ),
    ],
)
def test_names_of_local_parts(params: dict[str, StateOfParam], names: set[str]) -> None:
    assert local_part_names(params) == names


# --- whole loads -----------------------------------------------------------------------------------------------------


class LocalMoments(torch.optim.Optimizer):
    """A plain moment for each rank's part."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                local = p.to_local() if isinstance(p, DTensor) else p
                self.state[p].update(step=torch.tensor(1.0), exp_avg=torch.ones_like(local, requires_grad=False))


def network(*, sharded: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12, bias=False), nn.Linear(12, 12, bias=False))
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),))) if sharded else model


def save(path: str, kind: type[torch.optim.Optimizer], *, sharded: bool, with_weights: bool = False) -> None:
    model = network(sharded=sharded)
    optimizer = kind(model.parameters(), {"lr": 0.5})
    optimizer.step()
    state = {name: optimizer.state[p] for name, p in model.named_parameters()}
    groups = [{"lr": 0.5, "params": list(state)}]
    weights = {"model": model.state_dict()} if with_weights else {}
    dcp.save({"optim": {"state": state, "param_groups": groups}, **weights}, checkpoint_id=path)


def load(path: str, kind: type[torch.optim.Optimizer], *, sharded: bool) -> str:
    """What the load says, and that it has changed nothing; empty where it says nothing."""
    model = network(sharded=sharded)
    optimizer = kind(model.parameters(), {"lr": 0.5}) if kind is not torch.optim.Adam else kind(model.parameters())
    try:
        shardferry.load_optimizer_state(model, optimizer, path)
    except shardferry.ShardferryError as error:
        assert not optimizer.state
        return str(error)
    return ""


def save_moments(path: str, with_weights: bool) -> None:
    save(path, LocalMoments, sharded=True, with_weights=with_weights)


def load_moments(path: str, own: bool, sharded: bool) -> str:
    return load(path, LocalMoments if own else torch.optim.Adam, sharded=sharded)


@pytest.mark.parametrize("own", [pytest.param(True, id="local moments"), pytest.param(False, id="DTensors")])
@pytest.mark.parametrize("with_weights", [True, False])
def test_one_ranks_moments_are_refused_with_both_shapes(
    own: bool, with_weights: bool, ranks: RankPool, tmp_path: Path
) -> None:
    ranks.run(2, save_moments, str(tmp_path / "ckpt"), with_weights)
    for size in (1, 2, 3):
        for message in ranks.run(size, load_moments, str(tmp_path / "ckpt"), own, size > 1):
            assert "0.weight" in message
            assert "(6, 8)" in message
            assert "(12, 8)" in message
            if with_weights or size == 2:
                assert "one rank's part" in message
