"""State saved on N ranks, loaded on M: every element bitwise as the oracle says."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

import shardferry
from shardferry.checkpoint.open import open_checkpoint
from shardferry.config import LoadRequest
from shardferry.layout.mesh import Mesh
from shardferry.layout.spec import SpecLayout
from shardferry.plan.load_plan import PlannedTensor
from shardferry.plan.planner import plan_load
from tests.support.models import (
    OTHER,
    SHAPES,
    STATES,
    Model,
    adamw,
    check_state,
    distributed,
    fill_state,
    fsdp1,
    fsdp2,
    load_fsdp2,
    load_plain,
    save,
    save_one_group,
)
from tests.support.oracle import full_tensor
from tests.support.ranks import RankPool
from tests.support.simulation import expected, simulate

SIZES = (1, 2, 3, 4, 5, 6, 8)
PAIRS = ((1, 5), (2, 8), (3, 4), (4, 3), (5, 2), (6, 6), (8, 1), (8, 4))  # each size is a source, and a target
NUM_ELEMENTS = 2 * sum(torch.Size(shape).numel() for shape in SHAPES.values())
MATRICES = [fqn for fqn, shape in SHAPES.items() if len(shape) >= 2]
COLUMNS = {fqn: [Shard(1)] for fqn in MATRICES}
ROWS = {fqn: [Shard(0)] for fqn in SHAPES}


@pytest.mark.conformance(1)
@pytest.mark.conformance(3)
@pytest.mark.parametrize("target", SIZES)
def test_plans_from_every_size(saved_by: dict[int, Path], target: int) -> None:
    """All pairs of sizes without ranks: each element of each rank comes once, from the one place that has it."""
    layout = SpecLayout(Mesh((("dp", target),)), default={"dp": Shard(0)})
    for source in SIZES:
        catalog = open_checkpoint(str(saved_by[source]))
        filled = 0
        for rank in range(target):
            plan = plan_load(catalog, layout.rank(rank), LoadRequest("optim"))
            tensors = {(tensor.fqn, tensor.name) for tensor in plan.tensors}
            assert tensors >= {(fqn, name) for fqn in SHAPES for name in STATES}
            for tensor, memory in zip(plan.tensors, simulate(plan, catalog, numbers_of), strict=True):
                if tensor.name in STATES:
                    assert np.array_equal(memory, expected(tensor.layout)), f"{source} -> {target}: {tensor.key}"
                    filled += memory.size
        assert filled == NUM_ELEMENTS


def numbers_of(tensor: PlannedTensor) -> np.ndarray:
    shape = tensor.layout.global_shape
    return np.arange(math.prod(shape)).reshape(shape)


@pytest.mark.conformance(1)
@pytest.mark.conformance(3)
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_fsdp2_to_fsdp2(ranks: RankPool, saved_by: dict[int, Path], source: int, target: int) -> None:
    compared = ranks.run(target, load_fsdp2, str(saved_by[source]))
    assert sum(compared) == NUM_ELEMENTS


def load_columns(path: str) -> int:
    model = distributed(Model(), (torch.distributed.get_world_size(),), COLUMNS)
    optimizer = adamw(model, OTHER)
    shardferry.load_optimizer_state(model, optimizer, path)
    return check_state(model, optimizer)


@pytest.mark.conformance(4)
@pytest.mark.parametrize("target", SIZES)
def test_rows_to_columns(ranks: RankPool, saved_by: dict[int, Path], target: int) -> None:
    assert all(ranks.run(target, load_columns, str(saved_by[4])))


def save_columns(path: str) -> None:
    model = distributed(Model(), (torch.distributed.get_world_size(),), COLUMNS)
    optimizer = adamw(model)
    fill_state(model, optimizer)
    save(model, optimizer, path)


@pytest.mark.conformance(4)
@pytest.mark.parametrize("target", SIZES)
def test_columns_to_rows(ranks: RankPool, tmp_path: Path, target: int) -> None:
    ranks.run(3, save_columns, str(tmp_path / "ckpt"))
    compared = ranks.run(target, load_fsdp2, str(tmp_path / "ckpt"))
    assert sum(compared) == NUM_ELEMENTS


def load_replicated_and_sharded(path: str) -> int:
    placements = {fqn: [Replicate(), Shard(0)] for fqn in SHAPES}
    model = distributed(Model(), (2, 2), placements)
    optimizer = adamw(model, OTHER)
    shardferry.load_optimizer_state(model, optimizer, path)
    return check_state(model, optimizer)


@pytest.mark.conformance(4)
def test_rows_to_replicated_rows(ranks: RankPool, saved_by: dict[int, Path]) -> None:
    assert all(ranks.run(4, load_replicated_and_sharded, str(saved_by[3])))


def load_fsdp1(path: str, use_orig_params: bool) -> int:
    """FSDP1 mixes parameters and padding in flat tensors: each element's weight tells which index of which FQN it is.

    (Its own gathered state dict can't be the judge: on CPUs it gives all states of a parameter one and the same buffer.)
    """
    model = fsdp1(Model(), use_orig_params=use_orig_params)
    optimizer = torch.optim.AdamW(model.parameters(), lr=9.0)
    shardferry.load_optimizer_state(model, optimizer, path)
    compared = 0
    for parameter in model.parameters():
        state = optimizer.state.get(parameter, {})
        assert bool(state) == bool(parameter.numel())
        for name in state.keys() - {"step"}:
            expected = {0.0: 0.0} | {
                weight: value
                for fqn, shape in SHAPES.items()
                for weight, value in zip(
                    full_tensor(fqn, "weight", shape).view(-1).tolist(),
                    full_tensor(fqn, name, shape).view(-1).tolist(),
                    strict=True,
                )
            }
            weights = parameter.detach().view(-1).tolist()
            assert state[name].view(-1).tolist() == [expected[weight] for weight in weights]
            compared += sum(weight != 0.0 for weight in weights)
    return compared


@pytest.mark.conformance(1)
@pytest.mark.parametrize("use_orig_params", [False, True], ids=["flat", "orig"])
@pytest.mark.parametrize("target", [2, 3, 4])
def test_fsdp2_to_fsdp1(ranks: RankPool, tmp_path: Path, target: int, use_orig_params: bool) -> None:
    ranks.run(4, save_one_group, str(tmp_path / "ckpt"))
    compared = ranks.run(target, load_fsdp1, str(tmp_path / "ckpt"), use_orig_params)
    assert sum(compared) == NUM_ELEMENTS


@pytest.mark.parametrize("target", [1, 3])
def test_fsdp2_to_replicated(ranks: RankPool, saved_by: dict[int, Path], target: int) -> None:
    assert all(ranks.run(target, load_plain, str(saved_by[4])))


def save_each_rank_alone(path: str) -> None:
    """Without collectives every rank writes its own metadata, and its own copy of what is replicated."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = fsdp2(Model())
    optimizer = adamw(model)
    fill_state(model, optimizer)
    state = {"optim": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(path), use_collectives=False)


@pytest.mark.conformance(16)
@pytest.mark.parametrize("target", [2, 4])
def test_rank_local_metadata(ranks: RankPool, tmp_path: Path, target: int) -> None:
    ranks.run(3, save_each_rank_alone, str(tmp_path / "ckpt"))
    assert not (tmp_path / "ckpt" / ".metadata").exists()
    compared = ranks.run(target, load_fsdp2, str(tmp_path / "ckpt"))
    assert sum(compared) == NUM_ELEMENTS
