"""A load takes part of a job, and ranks in any order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import shardferry
from tests.support.models import SHAPES, STATES, Model, adamw, check_groups, check_state
from tests.support.networks import OTHERS
from tests.support.oracle import full_tensor
from tests.support.ranks import RankPool

NUM_ELEMENTS = len(STATES) * sum(torch.Size(shape).numel() for shape in SHAPES.values())


def load_in_parts_of_the_job(paths: list[str]) -> int:
    """Ranks 1 and 3 load one checkpoint, 0, 2 and 4 another, at the same time."""
    groups = [dist.new_group([0, 2, 4]), dist.new_group([1, 3])]
    mine = dist.get_rank() % 2
    model = fully_shard(Model(), mesh=DeviceMesh.from_group(groups[mine], "cpu"))
    optimizer = adamw(model, OTHERS)
    shardferry.load_optimizer_state(model, optimizer, paths[mine], process_group=groups[mine])
    check_groups(optimizer)
    return check_state(model, optimizer)


@pytest.mark.conformance(18)
def test_two_parts_of_one_job(ranks: RankPool, saved_by: dict[int, Path]) -> None:
    compared = ranks.run(5, load_in_parts_of_the_job, [str(saved_by[4]), str(saved_by[3])])
    assert sum(compared[::2]) == sum(compared[1::2]) == NUM_ELEMENTS


def load_in_another_order(path: str, order: list[int]) -> int:
    """The mesh places the ranks otherwise than they are numbered. (FSDP2 itself then mixes up its shards: DTensors only.)"""
    mesh = DeviceMesh("cpu", order)
    model = Model()
    for fqn, parameter in list(model.named_parameters()):
        owner, _, name = fqn.rpartition(".")
        laid = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
        model.get_submodule(owner).register_parameter(name, torch.nn.Parameter(laid))
    optimizer = adamw(model, OTHERS)
    shardferry.load_optimizer_state(model, optimizer, path)
    compared = 0
    for fqn, parameter in model.named_parameters():
        for name in STATES:
            found, full = optimizer.state[parameter][name].to_local(), full_tensor(fqn, name, parameter.shape)
            expected = full.chunk(len(order))[order.index(dist.get_rank()) :][:1]
            assert torch.equal(found, expected[0] if expected else found[:0])
            compared += found.numel()
    return compared


@pytest.mark.conformance(18)
@pytest.mark.parametrize("order", [[3, 2, 1, 0], [2, 0, 3, 1]], ids=str)
def test_ranks_in_another_order(ranks: RankPool, saved_by: dict[int, Path], order: list[int]) -> None:
    assert sum(ranks.run(4, load_in_another_order, str(saved_by[3]), order)) == NUM_ELEMENTS
