"""The layouts of live tensors against torch: its DTensors hold the indices that we say they hold."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from shardferry.errors import LayoutError
from shardferry.layout.from_tensor import layout_of_tensor, shard_left_to_right, strided_shard
from shardferry.layout.tensor_layout import AxisCut, TensorLayout
from tests.support.ranks import RankPool

MESHES = ((4,), (2, 2), (4, 2), (2, 2, 2))
SHAPES = ((8,), (9,), (5, 7), (16, 6), (3, 4, 10))


def read(layout: TensorLayout) -> torch.Tensor:
    """The local tensor of a whole one that numbers its elements."""
    whole = torch.arange(torch.Size(layout.global_shape).numel()).view(layout.global_shape)
    local = torch.full(layout.local_shape, -1)
    for box in layout.boxes:
        here = tuple(slice(o, e) for o, e in zip(box.local.offsets, box.local.ends, strict=True))
        there = tuple(slice(o, e) for o, e in zip(box.region.offsets, box.region.ends, strict=True))
        local[here] = whole[there]
    return local


def random_placements(rng: random.Random, ndim: int, axes: int) -> list[Placement]:
    choices: list[Placement] = [Replicate()]
    for dim in range(ndim):
        choices += [Shard(dim), _StridedShard(dim, split_factor=2), _StridedShard(dim, split_factor=3)]
    return [rng.choice(choices) for _ in range(axes)]


def compare_with_torch(mesh_shape: Sequence[int], seed: int) -> int:
    rng = random.Random(seed)
    mesh = init_device_mesh("cpu", tuple(mesh_shape))
    compared = 0
    for shape, _ in itertools.product(SHAPES, range(6)):
        placements = random_placements(rng, len(shape), len(mesh_shape))
        whole = torch.arange(torch.Size(shape).numel()).view(shape)
        tensor = distribute_tensor(whole, mesh, placements, src_data_rank=None)
        local = tensor.to_local()
        found = read(layout_of_tensor(tensor, name="w"))
        assert local.numel() == found.numel(), f"{shape} {placements}: {local} {found}"
        assert torch.equal(local.reshape(-1), found.reshape(-1)), f"{shape} {placements}: {local} {found}"
        compared += found.numel()
    return compared


@pytest.mark.conformance(4)
@pytest.mark.parametrize("mesh_shape", MESHES, ids=str)
def test_any_placements_on_any_mesh(ranks: RankPool, mesh_shape: tuple[int, ...]) -> None:
    assert all(ranks.run(torch.Size(mesh_shape).numel(), compare_with_torch, mesh_shape, 7))


ROWS = range(1, 41)  # of one parameter each: evenly and unevenly sharded, empty on some ranks
AXES = {"dp-tp": ("dp", "tp"), "dp-ep-tp": ("dp", "ep", "tp")}


def compare_with_fsdp2(mesh_shape: Sequence[int], axes: tuple[str, ...]) -> int:
    """FSDP2 over inner axes that have sharded the rows; each weight is the number of its row."""
    mesh = init_device_mesh("cpu", tuple(mesh_shape), mesh_dim_names=axes)
    inner = mesh[axes[1:]]
    module = torch.nn.Module()
    for rows in ROWS:
        weights = distribute_tensor(torch.arange(rows).float(), inner, [Shard(0)] * inner.ndim)
        module.register_parameter(f"rows{rows}", torch.nn.Parameter(weights))
    fully_shard(module, mesh=mesh[axes[:1]])
    compared = 0
    for name, parameter in module.named_parameters():
        local = parameter.to_local().detach().long()
        found = read(layout_of_tensor(parameter, name=name))
        assert torch.equal(local, found), f"{name} {parameter.placements}: {local} {found}"
        compared += local.numel()
    return compared


@pytest.mark.conformance(4)
@pytest.mark.parametrize(
    ("mesh_shape", "axes"),
    [((4, 2), "dp-tp"), ((3, 2), "dp-tp"), ((2, 4), "dp-tp"), ((2, 2, 2), "dp-ep-tp")],
    ids=str,
)
def test_what_fsdp2_has_in_memory(ranks: RankPool, mesh_shape: tuple[int, ...], axes: str) -> None:
    """Torch's own arithmetic of placements is not what FSDP2 does to uneven tensors; memory is the judge."""
    compared = ranks.run(torch.Size(mesh_shape).numel(), compare_with_fsdp2, mesh_shape, AXES[axes])
    assert sum(compared) == sum(ROWS)


@st.composite
def torch_cuts(draw: st.DrawFn, ndim: int) -> list[AxisCut]:
    choices: list[Placement] = [Replicate()]
    for dim in range(ndim):
        choices += [Shard(dim), *(strided_shard(dim, split_factor) for split_factor in (2, 3, 4))]
    cuts = []
    for _ in range(draw(st.integers(0, 3))):
        num_ranks = draw(st.integers(1, 4))
        cuts.append(AxisCut(num_ranks, draw(st.integers(0, num_ranks - 1)), draw(st.sampled_from(choices))))
    return cuts


def split_by_torch(whole: torch.Tensor, cuts: Sequence[AxisCut]) -> torch.Tensor:
    """What `distribute_tensor` does, axis by axis, without processes."""
    for cut in cuts:
        if isinstance(cut.placement, Shard | _StridedShard):
            parts, _ = cut.placement._split_tensor(whole, cut.num_ranks, with_padding=False, contiguous=False)
            whole = parts[cut.index]
    return whole


@given(st.data())
def test_any_placements_from_left_to_right(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 13), max_size=3), label="shape"))
    cuts = data.draw(torch_cuts(len(shape)), label="cuts")
    local = split_by_torch(torch.arange(torch.Size(shape).numel()).view(shape), cuts)
    layout = shard_left_to_right(shape, cuts)
    assert read(layout).reshape(-1).tolist() == local.reshape(-1).tolist()
    assert layout.wanted_numel == layout.local_numel == local.numel()


def a_partial_is_refused() -> str:
    mesh = init_device_mesh("cpu", (2,))
    tensor = torch.distributed.tensor.DTensor.from_local(torch.ones(4), mesh, [Partial()], run_check=False)
    with pytest.raises(LayoutError) as caught:
        layout_of_tensor(tensor, name="w")
    return str(caught.value)


def test_a_partial_is_refused(ranks: RankPool) -> None:
    for message in ranks.run(2, a_partial_is_refused):
        assert message.startswith("w: placement Partial(sum) can't be loaded")


def checkpointable(**fields: object) -> torch.Tensor:
    tensor = torch.zeros(6, 4)
    for name, value in fields.items():
        setattr(tensor, name, value)
    return tensor


def test_a_plain_tensor_may_name_the_regions_that_it_holds() -> None:
    tensor = checkpointable(
        global_shape=(20, 4),
        global_offsets=((4, 0), (12, 0)),
        local_offsets=((0, 0), (2, 0)),
        local_sizes=((2, 4), (4, 4)),
    )
    local = read(layout_of_tensor(tensor, name="w"))
    assert local[:, 0].tolist() == [16, 20, 48, 52, 56, 60]


def test_a_region_out_of_bounds_is_refused() -> None:
    tensor = checkpointable(
        global_shape=(20, 4), global_offsets=((18, 0),), local_offsets=((0, 0),), local_sizes=((6, 4),)
    )
    with pytest.raises(LayoutError, match=r"w: the tensor says that \[0:6, 0:4\].*is \[18:24, 0:4\] of \(20, 4\)"):
        layout_of_tensor(tensor, name="w")
