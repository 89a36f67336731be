"""Random tensors for property tests: shapes, the chunks in which they were saved, and the layouts in which ranks want them."""

from __future__ import annotations

import math
from itertools import pairwise, product

from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard

from shardferry.layout.from_tensor import shard_left_to_right, strided_shard
from shardferry.layout.tensor_layout import AxisCut, LocalRegion, TensorLayout, flat_slice, shard_on_mesh
from shardferry.region import Region


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    return tuple(draw(st.lists(st.integers(1, 9), min_size=0, max_size=3)))


@st.composite
def grids(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Region]:
    """The whole tensor cut anywhere along each dimension; empty chunks may lie in between."""
    bounds = []
    for size in shape:
        inner = draw(st.lists(st.integers(0, size), max_size=3))
        bounds.append(list(pairwise([0, *sorted(inner), size])))
    cells = [Region(tuple(a for a, _ in cell), tuple(b - a for a, b in cell)) for cell in product(*bounds)]
    return draw(st.permutations([*{cell.offsets: cell for cell in cells if cell.numel}.values()]))


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...]) -> TensorLayout:
    """One rank's share of a tensor: cut as we cut, as torch reads placements, by flat position, or in boxes of its own."""
    return draw(draw(st.sampled_from([cut_layouts, torch_layouts, flat_layouts, boxes_of_rows]))(shape))


@st.composite
def cut_layouts(draw: st.DrawFn, shape: tuple[int, ...]) -> TensorLayout:
    cuts = []
    for _ in range(draw(st.integers(0, 3))):
        ranks = draw(st.integers(1, 5))
        placement = draw(st.sampled_from([Replicate(), *(Shard(dim) for dim in range(len(shape)))]))
        cuts.append(AxisCut(ranks, draw(st.integers(0, ranks - 1)), placement))
    return shard_on_mesh(shape, cuts)


@st.composite
def torch_layouts(draw: st.DrawFn, shape: tuple[int, ...]) -> TensorLayout:
    """Shard and _StridedShard in any mix, several of one dimension too; the local tensor may be many boxes."""
    cuts = []
    for _ in range(draw(st.integers(0, 3)) if shape else 0):
        ranks = draw(st.integers(1, 4))
        dim, split_factor = draw(st.integers(0, len(shape) - 1)), draw(st.integers(1, 3))
        placement = Shard(dim) if split_factor == 1 else strided_shard(dim, split_factor)
        cuts.append(AxisCut(ranks, draw(st.integers(0, ranks - 1)), placement))
    return shard_left_to_right(shape, cuts)


@st.composite
def flat_layouts(draw: st.DrawFn, shape: tuple[int, ...]) -> TensorLayout:
    start = draw(st.integers(0, math.prod(shape)))
    return flat_slice(shape, start=start, stop=draw(st.integers(start, math.prod(shape))))


@st.composite
def boxes_of_rows(draw: st.DrawFn, shape: tuple[int, ...]) -> TensorLayout:
    """Some spans of rows, in any order in the local tensor, as a CheckpointableTensor may have them."""
    if not shape:
        return flat_slice(shape, start=0, stop=1)
    edges = sorted(draw(st.sets(st.integers(0, shape[0]), max_size=6)))
    spans = draw(st.permutations(list(pairwise(edges))))
    boxes, position, inner = [], 0, (0,) * (len(shape) - 1)
    for start, stop in spans[: draw(st.integers(0, len(spans)))]:
        sizes = (stop - start, *shape[1:])
        boxes.append(LocalRegion(Region((start, *inner), sizes), Region((position, *inner), sizes)))
        position += stop - start
    return TensorLayout(shape, (position, *shape[1:]), tuple(boxes))
