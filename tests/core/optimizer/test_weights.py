"""The model's weights in the same pass as the optimizer's state, between wrappers: every element bitwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

import shardferry
from tests.support.models import SHAPES, Model, adamw, distributed, fsdp1, fsdp2, save_one_group
from tests.support.oracle import full_tensor
from tests.support.ranks import RankPool

COLUMNS = {fqn: [Shard(1)] for fqn, shape in SHAPES.items() if len(shape) >= 2}
NUM_ELEMENTS = sum(torch.Size(shape).numel() for shape in SHAPES.values())


def wrapped(kind: str) -> nn.Module:
    """A model whose weights are all wrong."""
    model = Model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(-1.0)
    if kind == "fsdp2":
        return fsdp2(model)
    if kind == "columns":
        return distributed(model, (dist.get_world_size(),), COLUMNS)
    if kind == "ddp":
        return DistributedDataParallel(model)
    return fsdp1(model, use_orig_params=kind == "fsdp1-orig")


def load(path: str, kind: str) -> int:
    model = wrapped(kind)
    optimizer = torch.optim.AdamW(model.parameters()) if kind.startswith("fsdp1") else adamw(model)
    options = {"keys": "ignore_unexpected"}
    shardferry.load_optimizer_state(model, optimizer, path, model_key="model", **options)
    if kind.startswith("fsdp1"):
        return _of_flat(model)
    compared = 0
    for name, parameter in model.named_parameters():
        fqn = name.removeprefix("module.")
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        assert torch.equal(whole, full_tensor(fqn, "weight", SHAPES[fqn])), fqn
        compared += parameter.to_local().numel() if isinstance(parameter, DTensor) else parameter.numel()
    return compared


def _of_flat(model: nn.Module) -> int:
    """FSDP1's flat slices in their order; padding is what it was, and is no weight."""
    known = torch.cat([full_tensor(fqn, "weight", shape).view(-1) for fqn, shape in SHAPES.items()])
    local = torch.cat([parameter.detach().view(-1) for parameter in model.parameters()])
    local = local[local > 0]
    start = int((known.view(-1, 1) == local[:1]).nonzero()[0, 0]) if len(local) else 0
    assert torch.equal(known[start : start + len(local)], local)
    return len(local)


@pytest.mark.parametrize(
    ("kind", "target", "copies"),
    [("fsdp2", 3, 1), ("columns", 2, None), ("ddp", 2, 2), ("fsdp1-flat", 3, 1), ("fsdp1-orig", 2, 1)],
)
def test_weights_between_wrappers(
    ranks: RankPool, saved_one_group: Path, kind: str, target: int, copies: int | None
) -> None:
    compared = ranks.run(target, load, str(saved_one_group), kind)
    if copies is not None:
        assert sum(compared) == copies * NUM_ELEMENTS
    else:
        assert all(compared)


@pytest.fixture(scope="module")
def saved_one_group(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All parameters in one group of hyperparameters, which FSDP1's flat parameter needs."""
    path = tmp_path_factory.mktemp("weights") / "ckpt"
    ranks.run(4, save_one_group, str(path))
    return path
