"""The regions of all ranks as columns against those of one rank after the other."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Placement, Replicate, Shard

from shardferry.layout.mesh import Mesh
from shardferry.layout.spec import MeshBoxes, ranks_at
from shardferry.layout.tensor_layout import AxisCut, shard_on_mesh
from shardferry.region import Region


@st.composite
def meshes(draw: st.DrawFn) -> tuple[tuple[int, ...], Mesh, list[Placement], Region]:
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    dims = [Replicate(), *(Shard(dim) for dim in range(len(shape)))]
    placements: list[Placement] = [draw(st.sampled_from(dims)) for _ in sizes]
    offsets = tuple(draw(st.integers(0, size)) for size in shape)
    ends = tuple(draw(st.integers(offset, size)) for offset, size in zip(offsets, shape, strict=True))
    region = Region(offsets, tuple(e - o for e, o in zip(ends, offsets, strict=True)))
    return shape, Mesh(tuple((f"axis{i}", size) for i, size in enumerate(sizes))), placements, region


@given(meshes())
def test_columns_have_the_region_of_each_rank(case: tuple[tuple[int, ...], Mesh, list[Placement], Region]) -> None:
    shape, mesh, placements, region = case
    boxes = MeshBoxes(shape, mesh, placements, np.arange(mesh.size))
    holders: dict[Region, list[int]] = {}
    for rank in range(mesh.size):
        cuts = [
            AxisCut(size, index, placement)
            for (_, size), index, placement in zip(mesh.axes, mesh.coordinate(rank), placements, strict=True)
        ]
        layout = shard_on_mesh(shape, cuts)
        box = Region(tuple(boxes.offsets[rank].tolist()), tuple(boxes.sizes[rank].tolist()))
        assert box.sizes == layout.local_shape
        assert box.numel == 0 or box == layout.boxes[0].region
        if box.intersect(region) is not None:
            holders.setdefault(box, []).append(rank)
    assert boxes.holders(region) == holders


def test_ranks_at_coordinates_are_those_that_have_them() -> None:
    mesh = Mesh((("pp", 3), ("dp", 2), ("tp", 2)))
    coordinates = ((0, 2), None, (1,))
    found = ranks_at(mesh, np.arange(2, mesh.size), coordinates)
    wanted = [rank for rank in range(2, math.prod((3, 2, 2))) if mesh.coordinate(rank)[0] != 1 and rank % 2 == 1]
    assert found.tolist() == wanted
