"""The bytes that all ranks need, counted at once, against each rank's plan and the set of all needed elements."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Placement, Replicate, Shard

from shardferry.checkpoint.catalog import Catalog
from shardferry.config import LoadRequest
from shardferry.layout.mesh import Mesh
from shardferry.layout.spec import HeldBy, Rule, SpecLayout
from shardferry.pipeline.dry_run.demand import demand_of
from shardferry.plan.planner import plan_load
from shardferry.region import Region
from tests.strategies import grids, shapes
from tests.support.catalogs import catalog_of

REQUEST = LoadRequest("optim")
AXES = ("replicas", "shards", "tp")


@st.composite
def placements(draw: st.DrawFn, shape: tuple[int, ...]) -> dict[str, Placement]:
    ways = [Replicate(), *(Shard(dim) for dim in range(len(shape)))]
    return {axis: draw(st.sampled_from(ways)) for axis in AXES}


@st.composite
def loads(draw: st.DrawFn) -> tuple[Catalog, SpecLayout]:
    """Three parameters, two of which may be alike; some are held by some coordinates alone."""
    mesh = Mesh(tuple((axis, draw(st.integers(1, 4))) for axis in AXES))
    first = draw(shapes())
    model = {"a": first, "b": draw(st.sampled_from([first, (6,), (4, 3)])), "c": draw(shapes())}
    rules = tuple(Rule(fqn, draw(placements(shape))) for fqn, shape in model.items())
    held_by = tuple(
        HeldBy(fqn, {axis: tuple(draw(st.sets(st.integers(0, size - 1), min_size=1)))})
        for fqn, (axis, size) in draw(
            st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(mesh.axes)), max_size=2)
        )
    )
    saved = {fqn: (shape, draw(grids(shape))) for fqn, shape in model.items()}
    return catalog_of(saved), SpecLayout(mesh, rules, {}, held_by)


def elements(region: Region) -> list[tuple[int, ...]]:
    return list(product(*(range(o, e) for o, e in zip(region.offsets, region.ends, strict=True))))


def file_of(catalog: Catalog, key: str, element: tuple[int, ...]) -> int:
    saved = catalog.tensors[key]
    (chunk,) = [chunk for chunk in saved.chunks if element in elements(catalog.region(saved, chunk))]
    return int(catalog.chunk_file[chunk])


@given(loads())
def test_all_ranks_at_once_are_all_ranks_one_by_one(load: tuple[Catalog, SpecLayout]) -> None:
    catalog, spec = load
    demand = demand_of(catalog, spec, REQUEST)
    plans = [plan_load(catalog, spec.rank(rank), REQUEST) for rank in range(spec.world_size)]
    assert demand.needed.tolist() == [plan.bytes_needed for plan in plans]
    assert demand.arena.tolist() == [plan.arena_bytes for plan in plans]
    wanted = {
        (tensor.key, element)
        for plan in plans
        for tensor in plan.tensors
        for box in tensor.layout.boxes
        for element in elements(box.region)
    }
    assert demand.unique == 4 * len(wanted)
    files = np.bincount([file_of(catalog, key, element) for key, element in wanted], minlength=len(catalog.files))
    assert demand.of_files.tolist() == (4 * files).tolist()
    boxes = [[(t.key, t.layout.boxes) for t in plan.tensors if t.layout.boxes] for plan in plans]
    assert demand.first_equal.tolist() == [boxes.index(mine) for mine in boxes]


def test_a_scalar_is_wanted_whole_by_all() -> None:
    catalog = catalog_of({"w": ((), [Region((), ())])}, name="step")
    demand = demand_of(catalog, SpecLayout(Mesh((("dp", 3),))), REQUEST)
    assert (demand.needed.tolist(), demand.unique, demand.first_equal.tolist()) == ([4, 4, 4], 4, [0, 0, 0])
    assert math.isclose(demand.of_files.sum(), 4)
