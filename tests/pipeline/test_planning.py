"""Dry runs of many ranks: from the metadata alone, exact where ranks are planned, near where they are estimated."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Shard

from benchmarks.large import TransformerSize
from shardferry.checkpoint.catalog import Catalog
from shardferry.checkpoint.open import open_checkpoint
from shardferry.errors import PlanError, SpecError
from shardferry.layout.live import LiveLayout
from shardferry.layout.mesh import Mesh
from shardferry.layout.spec import SpecLayout
from shardferry.layout.tensor_layout import AxisCut, TensorLayout, shard_on_mesh
from shardferry.pipeline.display import print_plan
from shardferry.pipeline.dry_run.demand import demand_of, union_numel, unique_bytes
from shardferry.pipeline.dry_run.forecast import Forecast, forecast, plan_report
from shardferry.pipeline.dry_run.overrides import override, parse_mesh
from shardferry.pipeline.preflight import target_layout
from shardferry.region import Region
from shardferry.schemas.stage_config import StageConfig
from tests.support.commands import Command
from tests.support.transformers import write_metadata

SIZE = TransformerSize(layers=2, hidden=64, ffn=160, kv=16, vocab=96)
SAVED = SpecLayout(Mesh((("dp_shard", 16),)), (), {"dp_shard": Shard(0)})
ROWS, COLUMNS = {"dp_shard": "Shard(0)", "tp": "Shard(0)"}, {"dp_shard": "Shard(0)", "tp": "Shard(1)"}
TOPOLOGY = {
    "mesh": {"dp_replicate": 2, "dp_shard": 4, "tp": 2},
    "rules": [{"match": "*.w[qkv13].weight", "placements": ROWS}, {"match": "*.w[o2].weight", "placements": COLUMNS}],
    "default": {"dp_shard": "Shard(0)"},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without its data."""
    return write_metadata(SIZE, SAVED, tmp_path_factory.mktemp("ckpt") / "step-1000")


@pytest.fixture(scope="module")
def catalog(directory: Path) -> Catalog:
    return open_checkpoint(directory)


def config_of(mesh: dict[str, int] | None = None, **read: Any) -> StageConfig:
    topology = {**TOPOLOGY, **({"mesh": mesh} if mesh else {})}
    return StageConfig.from_values({"topology": topology, "read": read}, source="test")


def test_a_plan_of_16384_ranks_without_the_data(
    shardferry: Command, directory: Path, catalog: Catalog, tmp_path: Path
) -> None:
    spec = tmp_path / "stage.yaml"
    spec.write_text(
        json.dumps({"checkpoint": {"location": str(directory)}, "topology": TOPOLOGY, "read": {"strategy": "direct"}})
    )
    arguments = [
        "--mesh",
        "dp_replicate=8,dp_shard=256,tp=8",
        "--storage-bandwidth",
        "100MB",
        "--request-latency",
        "0.02",
    ]
    done = shardferry("plan", spec, *arguments, "--json")
    assert done.status == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["mesh"] == {"dp_replicate": 8, "dp_shard": 256, "tp": 8}
    assert [rank["rank"] for rank in report["ranks"]] == list(range(16384)), "all of them"
    objects = sum(item.byte_length for item in catalog.objects.values())
    assert report["unique_bytes_needed"] == catalog.total_bytes + objects
    assert report["lower_bound_s"] == report["unique_bytes_needed"] / 1e8
    assert (report["ranks_planned"], report["estimated"], report["strategy"]) == (32, True, "direct")
    waits = -(-max(rank["num_requests"] for rank in report["ranks"]) // 16)
    assert report["predicted_s"] == pytest.approx(report["storage_bytes_planned"] / 1e8 + 0.02 * waits)
    assert report["balance"]["bytes_needed"] >= 1


@pytest.mark.parametrize("strategy", ["direct", "cooperative"])
def test_ranks_that_are_planned_are_exact(catalog: Catalog, strategy: str) -> None:
    """Each rank's numbers are those of its own plan; together the ranks need each byte as often as there are replicas."""
    report = plan_report(config_of(strategy=strategy), catalog)
    assert (report.world_size, report.estimated) == (16, False)
    whole = sum(saved.nbytes for saved in catalog.tensors.values())
    assert sum(rank.bytes_sent for rank in report.ranks) == sum(rank.bytes_received for rank in report.ranks)
    assert report.storage_bytes_planned >= (2 * whole if strategy == "direct" else report.unique_bytes_needed)


def test_replicas_that_read_for_themselves_are_planned_once(catalog: Catalog) -> None:
    config = config_of({"dp_replicate": 8, "dp_shard": 4, "tp": 2}, strategy="direct")
    found = forecast_of(config, catalog, max_planned=8)
    assert (found.num_planned, found.is_estimated) == (8, False)
    assert found.ranks == forecast_of(config, catalog, max_planned=64).ranks


@pytest.mark.parametrize("strategy", ["direct", "cooperative"])
def test_estimates_are_near(catalog: Catalog, strategy: str) -> None:
    config = config_of({"dp_replicate": 4, "dp_shard": 8, "tp": 4}, strategy=strategy)
    exact, estimate = (forecast_of(config, catalog, max_planned=most) for most in (128, 16))
    assert (exact.is_estimated, estimate.is_estimated, estimate.num_planned) == (False, True, 16)
    assert [rank.bytes_needed for rank in estimate.ranks] == [rank.bytes_needed for rank in exact.ranks]
    assert [rank.arena_bytes for rank in estimate.ranks] == [rank.arena_bytes for rank in exact.ranks]
    for name in ("bytes_read", "bytes_received", "num_requests"):
        there, here = (sum(getattr(rank, name) for rank in found.ranks) for found in (exact, estimate))
        assert here == pytest.approx(there, rel=0.1), name


def forecast_of(config: StageConfig, catalog: Catalog, *, max_planned: int) -> Forecast:
    layout = target_layout(config)
    demand = demand_of(catalog, layout, config.checkpoint.request())
    return forecast(config, catalog, layout, demand, max_planned=max_planned)


def test_an_estimate_still_proves_the_whole_cover(catalog: Catalog) -> None:
    """A chunk that is missing may be one of a rank that isn't planned."""
    key = "optim.state.output.weight.exp_avg"
    chunks = catalog.tensors[key].chunks
    files = catalog.chunk_file.copy()
    files[chunks[9]] = -1
    damaged = Catalog(**{**vars(catalog), "chunk_file": files})
    with pytest.raises(PlanError, match=rf"{key}: \d+ of \d+ wanted elements are in no saved chunk, first at \[5\d:"):
        plan_report(config_of({"dp_replicate": 64, "dp_shard": 256, "tp": 1}), damaged)


def test_few_ranks_are_shown_each_and_many_are_summed_up(catalog: Catalog, capsys: pytest.CaptureFixture[str]) -> None:
    print_plan(plan_report(config_of({"dp_replicate": 1, "dp_shard": 16, "tp": 2}), catalog))
    assert "│ 31 " in capsys.readouterr().out
    print_plan(plan_report(config_of({"dp_replicate": 1, "dp_shard": 16, "tp": 4}), catalog))
    shown = capsys.readouterr().out
    assert "│ 31 " not in shown
    assert all(
        word in shown for word in ("64 ranks", "least", "median", "most", "estimated from the plans of 32 ranks")
    )


def test_unique_bytes_of_live_models_are_the_union_of_their_boxes(catalog: Catalog) -> None:
    """Two pipeline stages of two ranks; one layer is on both stages, and the second rank of a stage holds less."""
    shapes = SIZE.shapes()
    stages = [
        [fqn for fqn in shapes if "layers.1." not in fqn],
        [fqn for fqn in shapes if "layers.1." in fqn or "norm" in fqn],
    ]
    layouts: list[LiveLayout] = []
    for rank in range(4):
        parameters = {fqn: _half(shapes[fqn], rank % 2) for fqn in stages[rank // 2]}
        layouts.append(LiveLayout(rank, 4, parameters))
    values = dict.fromkeys(catalog.objects, 0.0)
    rows: dict[str, set[int]] = defaultdict(set)
    for layout in layouts:
        for fqn, lies in layout.parameters.items():
            for box in lies.boxes:
                rows[fqn].update(range(box.region.offsets[0], box.region.ends[0]))
    numel = sum(len(rows[fqn]) * Region.whole(shapes[fqn][1:]).numel for fqn in rows)
    objects = sum(item.byte_length for item in catalog.objects.values())
    request = config_of().checkpoint.request()
    assert unique_bytes(catalog, layouts, request, values) == 4 * (3 * numel + len(rows)) + objects


@st.composite
def regions(draw: st.DrawFn) -> list[Region]:
    ndim = draw(st.integers(0, 3))
    numbers = st.tuples(*[st.integers(0, 4)] * ndim)
    return draw(st.lists(st.builds(Region, numbers, numbers), max_size=7))


@given(regions())
def test_the_union_counts_each_element_once(boxes: list[Region]) -> None:
    elements = {index for box in boxes for index in itertools.product(*map(range, box.offsets, box.ends))}
    assert union_numel(boxes) == len(elements)


def _half(shape: tuple[int, ...], index: int) -> TensorLayout:
    return shard_on_mesh(shape, [AxisCut(2, index, Shard(0))])


@pytest.mark.parametrize(
    ("mesh", "world_size", "expected"),
    [
        pytest.param(None, 64, {"dp_replicate": 2, "dp_shard": 16, "tp": 2}, id="dp_shard-grows"),
        pytest.param(None, 4, {"dp_replicate": 2, "dp_shard": 1, "tp": 2}, id="dp_shard-shrinks"),
        pytest.param("dp_shard=6,tp=4", None, {"dp_shard": 6, "tp": 4}, id="another-mesh"),
        pytest.param("dp_shard = 6 , tp=4", 24, {"dp_shard": 6, "tp": 4}, id="both-agree"),
    ],
)
def test_another_mesh(mesh: str | None, world_size: int | None, expected: dict[str, int]) -> None:
    changed = override(config_of(), mesh=mesh, world_size=world_size)
    assert changed.topology is not None
    assert list(changed.topology.mesh.items()) == list(expected.items())


def test_without_dp_shard_the_outermost_axis_is_scaled() -> None:
    topology = {"mesh": {"dp": 2, "tp": 2}, "default": {"dp": "Shard(0)"}}
    config = StageConfig.from_values({"topology": topology}, source="test")
    changed = override(config, world_size=12, storage_bandwidth="2GiB")
    assert changed.topology is not None
    assert changed.topology.mesh == {"dp": 6, "tp": 2}
    assert changed.read.storage_bandwidth == 2 << 30
    assert changed.topology.default == config.topology.default if config.topology else False


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"world_size": 6},
            r"--world-size 6: is not a multiple of 4, the ranks of the other axes \(dp_replicate=2 x tp=2\)",
        ),
        ({"mesh": "dp_shard=4", "world_size": 6}, "--mesh makes 4 ranks, --world-size says 6"),
        ({"mesh": "dp_shard=4"}, "axis 'tp' is not in the mesh"),
        ({"mesh": "dp_shard=x"}, "'dp_shard=x' is not an axis"),
        ({"mesh": "tp=2,tp=2"}, "the axis 'tp' is given twice"),
        ({"mesh": "dp_shard=0,tp=1"}, r"topology\.mesh\.dp_shard: .*greater than 0"),
        ({"storage_bandwidth": "fast"}, "--storage-bandwidth fast: is not a number of bytes"),
        ({"storage_bandwidth": "0"}, "--storage-bandwidth 0: must be at least 1 byte per second"),
    ],
    ids=lambda value: ",".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_changes_that_make_no_spec(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        override(config_of(), **changes)


def test_a_spec_without_topology_has_no_mesh_to_change() -> None:
    with pytest.raises(SpecError, match="topology: missing"):
        override(StageConfig(), world_size=4)


def test_meshes_are_ordered_as_written() -> None:
    assert list(parse_mesh("tp=8,dp=2").items()) == [("tp", 8), ("dp", 2)]
