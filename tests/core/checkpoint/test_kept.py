"""Loaded arenas as a checkpoint: any topology from them is bitwise what the first checkpoint gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardferry.checkpoint.kept import KeptBox, KeptIndex, arena_file
from shardferry.checkpoint.open import open_checkpoint
from shardferry.config import LoadRequest, ReadOptions
from shardferry.exchange.agreement import Agreement
from shardferry.layout.mesh import Mesh, parse_placement
from shardferry.layout.spec import SpecLayout
from shardferry.load import LoadedShard, LoadJob, load_rank
from shardferry.plan.kept import index_of
from shardferry.region import Region
from tests.support.models import SHAPES, STATES

MESHES = [(("dp", 1),), (("dp", 3),), (("r", 2), ("dp", 2)), (("dp", 2), ("tp", 2)), (("tp", 4),)]


@st.composite
def topologies(draw: st.DrawFn) -> SpecLayout:
    """Rows, columns, replicas, and mixes of them."""
    mesh = Mesh(draw(st.sampled_from(MESHES)))
    placements = {
        axis: parse_placement(draw(st.sampled_from(["Shard(0)", "Shard(1)", "Replicate"]))) for axis, _ in mesh.axes
    }
    return SpecLayout(mesh, (), placements, ())


def load_all(path: Path, layout: SpecLayout, request: LoadRequest) -> list[LoadedShard]:
    catalog = open_checkpoint(path)
    jobs = [
        LoadJob(catalog, layout.rank(rank), request, torch.device("cpu"), ReadOptions(strategy="direct"))
        for rank in range(layout.world_size)
    ]
    return [load_rank(job, Agreement(None)) for job in jobs]


def write(loaded: list[LoadedShard], path: Path) -> None:
    """As the guard and the loaders of kept state serve it."""
    path.mkdir()
    for rank, shard in enumerate(loaded):
        (path / arena_file(rank, 0)).write_bytes(shard.arena.as_bytes().numpy().tobytes())
    for name, data in index_of([[shard.manifest] for shard in loaded]).files().items():
        (path / name).write_bytes(data)


@pytest.mark.parametrize("model_key", [None, "model"])
@given(data=st.data())
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_through_memory_is_as_from_storage(
    saved_by: dict[int, Path],
    tmp_path_factory: pytest.TempPathFactory,
    model_key: str | None,
    data: st.DataObject,
) -> None:
    first, second = data.draw(topologies()), data.draw(topologies())
    request = LoadRequest(model_key=model_key)
    kept = tmp_path_factory.mktemp("kept") / "state"
    write(load_all(saved_by[4], first, request), kept)
    expected, found = load_all(saved_by[4], second, request), load_all(kept, second, request)
    for one, other in zip(expected, found, strict=True):
        mine, theirs = one.state(), other.state()
        for fqn in SHAPES:
            assert set(mine.entries(fqn)) == set(theirs.entries(fqn))
        assert mine.param_groups == theirs.param_groups
        state, again = mine.state_dict()["state"], theirs.state_dict()["state"]
        for fqn in state:
            for name in STATES:
                assert torch.equal(state[fqn][name], again[fqn][name]), (fqn, name)
            assert float(state[fqn]["step"]) == float(again[fqn]["step"])
        if model_key is not None:
            weights = theirs.model_state_dict()
            assert all(torch.equal(tensor, weights[fqn]) for fqn, tensor in mine.model_state_dict().items())


@pytest.mark.parametrize(
    ("sizes", "strides", "expected"),
    [
        ((2, 3), (3, 1), [((0, 0), (2, 3), 100)]),
        ((2, 3), (5, 1), [((0, 0), (1, 3), 100), ((1, 0), (1, 3), 120)]),
        ((1, 3), (9, 1), [((0, 0), (1, 3), 100)]),
        ((2, 2, 2), (8, 4, 1), [((i, j, 0), (1, 1, 2), 100 + 32 * i + 16 * j) for i in range(2) for j in range(2)]),
        ((2, 0), (5, 1), []),
        ((), (), [((), (), 100)]),
    ],
)
def test_boxes_that_are_not_contiguous_are_cut(
    sizes: tuple[int, ...], strides: tuple[int, ...], expected: list[tuple[tuple[int, ...], tuple[int, ...], int]]
) -> None:
    index = KeptIndex()
    box = KeptBox(Region((0,) * len(sizes), sizes), "arena-0-0", 100, strides)
    index.add_tensor(["state", "w", "exp_avg"], torch.float32, sizes, [box])
    found = index.tensors["state.w.exp_avg"]["boxes"].values()
    assert [(offsets, box_sizes, at) for offsets, box_sizes, _, at in found] == expected
