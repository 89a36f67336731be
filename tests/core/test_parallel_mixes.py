"""Models that are wrapped as people wrap them: FSDP2 over TP, HSDP; torch itself gathers the whole state to compare."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import shardferry
from tests.support.models import STATES, STEP, adamw, fill_state, save
from tests.support.oracle import full_tensor
from tests.support.ranks import RankPool

EVEN, UNEVEN = (16, 8), (14, 6)  # hidden, in and out: rows that do and don't divide by 4


_MESHES = itertools.count()  # of this process


def named_mesh(shape: tuple[int, int], *names: str) -> DeviceMesh:
    """Under names of its own: torch keeps what it knows of a mesh, and an equal one of an earlier process group is gone."""
    number = next(_MESHES)
    return init_device_mesh("cpu", shape, mesh_dim_names=tuple(f"{name}_{number}" for name in names))


def perceptron(hidden: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width), nn.LayerNorm(width))


def tp_and_fsdp2(sizes: tuple[int, int], dp: int, tp: int) -> nn.Module:
    mesh = named_mesh((dp, tp), "dp", "tp")
    dp_name, tp_name = mesh.mesh_dim_names or ()
    model = parallelize_module(perceptron(*sizes), mesh[tp_name], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return fully_shard(model, mesh=mesh[dp_name])


def hsdp(sizes: tuple[int, int], replicas: int, shards: int) -> nn.Module:
    return fully_shard(perceptron(*sizes), mesh=named_mesh((replicas, shards), "dp_replicate", "dp_shard"))


WRAPPED = {"tp-fsdp2": tp_and_fsdp2, "hsdp": hsdp}


def save_plain(path: str, sizes: tuple[int, int]) -> None:
    model = perceptron(*sizes)
    optimizer = adamw(model)
    fill_state(model, optimizer)
    save(model, optimizer, path)


def load_wrapped(path: str, kind: str, sizes: tuple[int, int], outer: int, inner: int) -> int:
    model = WRAPPED[kind](sizes, outer, inner)
    optimizer = adamw(model)
    shardferry.load_optimizer_state(model, optimizer, path)
    compared = 0
    for fqn, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        assert float(state["step"]) == STEP
        for name in STATES:
            whole = state[name].full_tensor() if isinstance(state[name], DTensor) else state[name]
            assert state[name].placements == parameter.placements
            assert torch.equal(whole, full_tensor(fqn, name, parameter.shape)), f"{fqn}.{name}"
            compared += whole.numel()
    return compared


@pytest.mark.conformance(5)
@pytest.mark.conformance(6)
@pytest.mark.parametrize("sizes", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize(("kind", "outer", "inner"), [("tp-fsdp2", 2, 2), ("tp-fsdp2", 4, 2), ("hsdp", 2, 2)])
def test_plain_to_wrapped(
    ranks: RankPool, tmp_path: Path, kind: str, sizes: tuple[int, int], outer: int, inner: int
) -> None:
    ranks.run(1, save_plain, str(tmp_path / "ckpt"), sizes)
    assert all(ranks.run(outer * inner, load_wrapped, str(tmp_path / "ckpt"), kind, sizes, outer, inner))


def save_wrapped(path: str, kind: str, sizes: tuple[int, int], outer: int, inner: int) -> None:
    """State comes from a plain load, which the test above holds: here it is only what stock torch then writes."""
    model = WRAPPED[kind](sizes, outer, inner)
    optimizer = adamw(model)
    shardferry.load_optimizer_state(model, optimizer, path)
    save(model, optimizer, path + "-again")


def load_plain(path: str, sizes: tuple[int, int]) -> int:
    model = perceptron(*sizes)
    optimizer = adamw(model)
    shardferry.load_optimizer_state(model, optimizer, path)
    compared = 0
    for fqn, parameter in model.named_parameters():
        for name in STATES:
            assert torch.equal(optimizer.state[parameter][name], full_tensor(fqn, name, parameter.shape))
            compared += parameter.numel()
    return compared


@pytest.mark.conformance(5)
@pytest.mark.conformance(6)
@pytest.mark.parametrize("kind", ["tp-fsdp2", "hsdp"])
def test_wrapped_to_plain(ranks: RankPool, tmp_path: Path, kind: str) -> None:
    ranks.run(1, save_plain, str(tmp_path / "ckpt"), EVEN)
    ranks.run(4, save_wrapped, str(tmp_path / "ckpt"), kind, EVEN, 2, 2)
    assert all(ranks.run(3, load_plain, str(tmp_path / "ckpt-again"), EVEN))
