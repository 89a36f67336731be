"""Load plans against brute force over elements: each wanted element from the one right saved element, exactly once."""

from __future__ import annotations

import math
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Shard

from shardferry.config import LoadRequest
from shardferry.errors import PlanError
from shardferry.layout.live import LiveLayout
from shardferry.layout.tensor_layout import AxisCut, TensorLayout, flat_slice, shard_on_mesh
from shardferry.plan.load_plan import LoadPlan
from shardferry.plan.planner import ALIGNMENT, plan_load
from shardferry.region import Region
from tests.strategies import grids, layouts, shapes
from tests.support.catalogs import catalog_of
from tests.support.simulation import expected


def rows(*bounds: int) -> list[Region]:
    """1-dim chunks between these positions."""
    return [Region((start,), (stop - start,)) for start, stop in pairwise(bounds)]


def plan_of(shape: tuple[int, ...], saved: list[Region], layout: TensorLayout) -> LoadPlan:
    catalog = catalog_of({"w": (shape, saved)})
    return plan_load(catalog, LiveLayout(0, 1, {"w": layout}), LoadRequest("optim"))


def one_row(size: int, ranks: int, rank: int) -> TensorLayout:
    return shard_on_mesh((size,), [AxisCut(ranks, rank, Shard(0))])


@pytest.mark.conformance(2)
@pytest.mark.parametrize(
    ("size", "saved", "ranks", "rank", "reads"),
    [
        # (chunk, offset in the chunk, offset in the local tensor, length)
        pytest.param(128, 8, 4, 1, [(2, 0, 0, 16), (3, 0, 16, 16)], id="shrink-8-4"),
        pytest.param(128, 4, 8, 3, [(1, 16, 0, 16)], id="grow-4-8"),
        pytest.param(120, 4, 3, 0, [(0, 0, 0, 30), (1, 0, 30, 10)], id="4-3-first"),
        pytest.param(120, 4, 3, 1, [(1, 10, 0, 20), (2, 0, 20, 20)], id="4-3-second"),
    ],
)
def test_exact_plans(size: int, saved: int, ranks: int, rank: int, reads: list[tuple[int, ...]]) -> None:
    chunks = rows(*range(0, size + 1, size // saved))
    plan = plan_of((size,), chunks, one_row(size, ranks, rank))
    found = [
        (item.chunk, item.copy.source.offsets[0], item.copy.offset, item.copy.source.sizes[0]) for item in plan.reads
    ]
    assert found == reads


@pytest.mark.conformance(2)
def test_a_box_over_two_chunks() -> None:
    plan = plan_of((16,), rows(0, 8, 16), flat_slice((16,), start=4, stop=11))
    assert [(item.chunk, item.copy.source, item.copy.offset) for item in plan.reads] == [
        (0, Region((4,), (4,)), 0),
        (1, Region((0,), (3,)), 4),
    ]


@st.composite
def loads(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Region], TensorLayout]:
    shape = draw(shapes())
    return shape, draw(grids(shape)), draw(layouts(shape))


def simulate(plan: LoadPlan, shape: tuple[int, ...], saved: list[Region]) -> np.ndarray:
    """The local tensor's memory after the reads; -1 where nothing arrived. Fails where something arrives twice."""
    (tensor,) = plan.tensors
    whole = np.arange(math.prod(shape)).reshape(shape)
    memory = np.full(tensor.layout.local_numel, -1)
    for item in plan.reads:
        chunk = saved[item.chunk]
        content = whole[tuple(map(slice, chunk.offsets, chunk.ends))]
        for index in product(*map(range, item.copy.source.sizes)):
            place = item.copy.offset + sum(i * s for i, s in zip(index, item.copy.strides, strict=True))
            assert memory[place] == -1, "filled twice"
            memory[place] = content[tuple(o + i for o, i in zip(item.copy.source.offsets, index, strict=True))]
    return memory


@given(loads())
def test_every_wanted_element_is_filled_once_from_the_right_place(
    load: tuple[tuple[int, ...], list[Region], TensorLayout],
) -> None:
    shape, saved, layout = load
    plan = plan_of(shape, saved, layout)
    assert simulate(plan, shape, saved).tolist() == expected(layout).tolist()
    assert plan.bytes_needed == 4 * layout.wanted_numel
    assert plan == plan_of(shape, saved, layout), "plans are deterministic"
    assert plan.arena_bytes % ALIGNMENT == 0


@pytest.mark.conformance(7)
@given(loads(), st.data())
def test_a_missing_chunk_is_an_error_exactly_where_it_is_wanted(
    load: tuple[tuple[int, ...], list[Region], TensorLayout], data: st.DataObject
) -> None:
    shape, saved, layout = load
    missing = data.draw(st.sampled_from(saved))
    rest = [region for region in saved if region != missing]
    if any(box.region.intersect(missing) for box in layout.boxes):
        with pytest.raises(
            PlanError, match=r"optim\.state\.w\.exp_avg: \d+ of \d+ wanted elements are in no saved chunk"
        ):
            plan_of(shape, rest, layout)
    else:
        assert simulate(plan_of(shape, rest, layout), shape, rest).tolist() == expected(layout).tolist()


@pytest.mark.conformance(8)
@given(loads(), st.data())
def test_an_overlap_is_an_error_exactly_where_it_is_wanted(
    load: tuple[tuple[int, ...], list[Region], TensorLayout], data: st.DataObject
) -> None:
    """Another chunk is saved on top: by another rank, at another place."""
    shape, saved, layout = load
    offsets = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    sizes = tuple(data.draw(st.integers(1, size - o)) for size, o in zip(shape, offsets, strict=True))
    extra = Region(offsets, sizes)
    if any(region.offsets == offsets for region in saved):
        return  # the metadata can't even say that: it knows a chunk by its offsets
    if any(box.region.intersect(extra) for box in layout.boxes):
        with pytest.raises(PlanError, match=r"optim\.state\.w\.exp_avg: .* is saved twice, in __\d+_0\.distcp"):
            plan_of(shape, [*saved, extra], layout)
    else:
        both = [*saved, extra]
        assert simulate(plan_of(shape, both, layout), shape, both).tolist() == expected(layout).tolist()


@pytest.mark.conformance(7)
def test_the_hole_is_named_by_its_box() -> None:
    saved = [Region((0, 0), (2, 4)), Region((2, 0), (2, 3))]
    with pytest.raises(PlanError, match=r"2 of 16 wanted elements .* first at \[2:4, 3:4\] of the shape \(4, 4\)"):
        plan_of((4, 4), saved, shard_on_mesh((4, 4), []))
