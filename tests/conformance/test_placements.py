"""Every placement to every other, of one axis and of two, onto fewer and more ranks."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import shardferry
from tests.support.models import STATES, adamw, fill_state, like_parameter, save
from tests.support.oracle import full_tensor
from tests.support.ranks import RankPool

EACH = (Replicate(), Shard(0), Shard(1))
FSDP2_OVER_TP = (_StridedShard(0, split_factor=2), Shard(0))
SHAPE = (9, 7)
EVEN = (8, 12)  # of strided tensors: where those are uneven, torch saves them wrong


@dataclass(frozen=True)
class Way:
    """One way to lay a tensor out."""

    mesh_shape: tuple[int, ...]
    placements: tuple[Placement, ...]


def ways(*mesh_shapes: tuple[int, ...]) -> list[Way]:
    found = [Way(mesh, how) for mesh in mesh_shapes for how in itertools.product(EACH, repeat=len(mesh))]
    return found + [Way(mesh, FSDP2_OVER_TP) for mesh in mesh_shapes if len(mesh) == 2]


SOURCES = ways((4,), (2, 2))
TARGETS = {2: ways((2,)), 4: ways((4,), (2, 2)), 8: ways((4, 2))}
ALL_TARGETS = list(itertools.chain(*TARGETS.values()))


class Weights(nn.Module):
    """One parameter for each pair of a source and a target."""

    def __init__(self, pairs: list[tuple[int, int]], way_of: dict[tuple[int, int], Way]) -> None:
        super().__init__()
        mesh_shapes = sorted({way_of[pair].mesh_shape for pair in pairs})
        meshes = {shape: init_device_mesh("cpu", shape) for shape in mesh_shapes}
        for pair in pairs:
            way = way_of[pair]
            fqn = f"from{pair[0]}to{pair[1]}"
            strided = FSDP2_OVER_TP in (SOURCES[pair[0]].placements, ALL_TARGETS[pair[1]].placements)
            whole = full_tensor(fqn, "weight", EVEN if strided else SHAPE)
            laid = distribute_tensor(whole, meshes[way.mesh_shape], way.placements, src_data_rank=None)
            self.register_parameter(fqn, nn.Parameter(laid))


def save_all(path: str) -> None:
    pairs = list(itertools.product(range(len(SOURCES)), range(len(ALL_TARGETS))))
    model = Weights(pairs, {pair: SOURCES[pair[0]] for pair in pairs})
    optimizer = adamw(model)
    fill_state(model, optimizer)
    save(model, optimizer, path)


def load_all(path: str, num_ranks: int) -> int:
    numbers = [number for number, way in enumerate(ALL_TARGETS) if way in TARGETS[num_ranks]]
    pairs = list(itertools.product(range(len(SOURCES)), numbers))
    model = Weights(pairs, {pair: ALL_TARGETS[pair[1]] for pair in pairs})
    optimizer = adamw(model)
    shardferry.load_optimizer_state(model, optimizer, path, keys="ignore_unexpected")  # those of other targets
    compared = 0
    for fqn, parameter in model.named_parameters():
        for name in STATES:
            found = optimizer.state[parameter][name]
            expected = full_tensor(fqn, name, parameter.shape)
            assert found.placements == parameter.placements
            assert torch.equal(found.to_local(), like_parameter(parameter, expected).to_local()), f"{fqn} {found}"
            compared += 1
    return compared


@pytest.mark.conformance(4)
@pytest.mark.parametrize("num_ranks", TARGETS)
def test_every_placement_to_every_other(ranks: RankPool, all_saved: Path, num_ranks: int) -> None:
    compared = ranks.run(num_ranks, load_all, str(all_saved), num_ranks)
    assert compared == [2 * len(SOURCES) * len(TARGETS[num_ranks])] * num_ranks


@pytest.fixture(scope="module")
def all_saved(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All sources, in one checkpoint of 4 ranks."""
    path = tmp_path_factory.mktemp("placements") / "ckpt"
    ranks.run(4, save_all, str(path))
    return path
