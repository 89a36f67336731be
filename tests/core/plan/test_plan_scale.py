"""What planning costs, counted: it grows with what one rank wants, not with how many ranks save or load."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from torch.distributed.tensor import Shard

from benchmarks.large import TransformerSize, tp_fsdp
from shardferry.config import LoadRequest, SplitLimits
from shardferry.layout import tensor_layout as layout
from shardferry.layout.mesh import Mesh
from shardferry.layout.spec import Rule, SpecLayout
from shardferry.pipeline.dry_run import demand
from shardferry.plan import cover
from shardferry.plan import rank_layouts as wants
from shardferry.plan import split as slabs
from shardferry.plan.cooperative import assign_reads
from shardferry.plan.cover import check_cover, covering_chunks
from shardferry.plan.planner import plan_load
from shardferry.plan.rank_layouts import LayoutsFromSpec
from shardferry.region import Region
from tests.support.commands import REPOSITORY
from tests.support.simulation import simulate
from tests.support.transformers import synthetic_catalog

REQUEST = LoadRequest("optim")
SMALL = TransformerSize(layers=3, hidden=32, ffn=80, kv=8, vocab=48)
KINDS = 9
SAVED = SpecLayout(Mesh((("dp_shard", 16),)), (), {"dp_shard": Shard(0)})


def wanted(replicas: int, shards: int, tp: int) -> SpecLayout:
    return tp_fsdp(Mesh((("dp_replicate", replicas), ("dp_shard", shards), ("tp", tp))))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often boxes are cut, covers are proven, and chunks are divided."""
    counts: Counter[str] = Counter()

    def count(where: object, name: str) -> None:
        function: Callable[..., object] = getattr(where, name)

        def counted(*args: object, **kwargs: object) -> object:
            counts[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(where, name, counted)

    count(cover, "_covering_rows")
    count(layout, "single_box")
    count(slabs, "copies_out_of")
    count(wants, "MeshBoxes")
    count(demand, "MeshBoxes")
    return counts


def test_a_plan_proves_one_cover_for_each_kind_of_tensor_whatever_the_world_size(calls: Counter[str]) -> None:
    """Seven kinds of matrices (shape and placements), vectors, and steps."""
    catalog = synthetic_catalog(SMALL, SAVED)
    costs = []
    for replicas, shards in ((1, 2), (8, 2), (1, 512), (512, 512)):
        calls.clear()
        plan_load(catalog, wanted(replicas, shards, tp=2).rank(1), REQUEST)
        costs.append((calls["_covering_rows"], calls["single_box"]))
    assert costs == [costs[0]] * 4
    assert costs[0][0] == KINDS < len(catalog.tensors)


def test_more_layers_cost_no_more_covers(calls: Counter[str]) -> None:
    counts = []
    for layers in (1, 30):
        size = TransformerSize(layers, SMALL.hidden, SMALL.ffn, SMALL.kv, SMALL.vocab)
        catalog = synthetic_catalog(size, SAVED)
        calls.clear()
        plan_load(catalog, wanted(2, 4, tp=2).rank(5), REQUEST)
        check_cover(catalog, catalog.tensors.values())
        counts.append(calls["_covering_rows"])
    assert counts[0] == counts[1]


def test_sharing_looks_at_those_who_want_the_same_chunks_alone(calls: Counter[str]) -> None:
    """Saved and wanted by 16 or by 128, each twice: a chunk is wanted by two ranks. Steps are wanted by all, and alike."""
    size = TransformerSize(layers=2, hidden=256, ffn=512, kv=128, vocab=256)
    counts = []
    for shards in (16, 128):
        catalog = synthetic_catalog(size, SpecLayout(Mesh((("dp_shard", shards),)), (), {"dp_shard": Shard(0)}))
        spec = SpecLayout(Mesh((("dp_replicate", 2), ("dp_shard", shards))), (), {"dp_shard": Shard(0)})
        mine = plan_load(catalog, spec.rank(5), REQUEST)
        calls.clear()
        assign_reads(
            mine, catalog, LayoutsFromSpec(spec, range(spec.world_size)), limits=SplitLimits(max_part_bytes=1 << 20)
        )
        counts.append((calls["copies_out_of"], calls["MeshBoxes"]))
    assert counts[0] == counts[1] == (6, 6), "five kinds of matrices and vectors, and the steps"


def test_all_ranks_are_counted_with_one_array_for_each_kind(calls: Counter[str]) -> None:
    catalog = synthetic_catalog(SMALL, SAVED)
    for spec in (wanted(1, 2, tp=2), wanted(8, 256, tp=8)):
        calls.clear()
        found = demand.demand_of(catalog, spec, REQUEST)
        assert calls["MeshBoxes"] == KINDS
        assert calls["_covering_rows"] == 0
        assert len(found.needed) == spec.world_size
        assert found.unique == sum(saved.nbytes for saved in catalog.tensors.values())


@pytest.mark.parametrize("rank", [0, 777, 1023])
def test_a_rank_of_many_gets_each_element_from_its_place(rank: int) -> None:
    catalog = synthetic_catalog(SMALL, SAVED)
    spec = wanted(8, 16, tp=8)
    mine = plan_load(catalog, spec.rank(rank), REQUEST)
    numbers = {key: np.arange(np.prod(t.shape, dtype=int)).reshape(t.shape) for key, t in catalog.tensors.items()}
    for tensor, memory in zip(mine.tensors, simulate(mine, catalog, lambda t: numbers[t.key]), strict=True):
        here = [numbers[tensor.key][tuple(map(slice, b.region.offsets, b.region.ends))] for b in tensor.layout.boxes]
        assert memory.tolist() == [number for part in here for number in part.ravel().tolist()]


def test_a_cover_of_very_many_chunks_is_proven_without_comparing_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid of 128 x 64 chunks; neighbours in a row would be compared with each other."""
    compared: list[int] = []
    monkeypatch.setattr(cover, "first_overlap", lambda offsets, _: compared.append(len(offsets)))
    mesh = Mesh((("dp_shard", 128), ("tp", 64)))
    rules = (Rule("output.weight", {"dp_shard": Shard(0), "tp": Shard(1)}),)
    saved = SpecLayout(mesh, rules, {"dp_shard": Shard(0)})
    size = TransformerSize(layers=0, hidden=128, ffn=128, kv=128, vocab=128)
    catalog = synthetic_catalog(size, saved, states=("exp_avg",))
    tensor = catalog.tensors["optim.state.output.weight.exp_avg"]
    assert len(covering_chunks(catalog, tensor, Region.whole(tensor.shape))) == 128 * 64
    assert compared == []


_PRINT_PLAN = """
from torch.distributed.tensor import Shard
from shardferry.config import LoadRequest, SplitLimits
from shardferry.layout.mesh import Mesh
from shardferry.layout.spec import SpecLayout
from shardferry.plan.cooperative import assign_reads
from shardferry.plan.planner import plan_load
from shardferry.plan.rank_layouts import LayoutsFromSpec
from benchmarks.large import TransformerSize, tp_fsdp
from tests.support.transformers import synthetic_catalog
saved = SpecLayout(Mesh((("dp_shard", 16),)), (), {"dp_shard": Shard(0)})
catalog = synthetic_catalog(TransformerSize(layers=3, hidden=32, ffn=80, kv=8, vocab=48), saved)
spec = tp_fsdp(Mesh((("dp_replicate", 2), ("dp_shard", 4), ("tp", 2))))
plan = plan_load(catalog, spec.rank(5), LoadRequest("optim"))
groups = {r: str(r // 4) for r in range(16)}
limits = SplitLimits(max_part_bytes=1 << 20)
print(assign_reads(plan, catalog, LayoutsFromSpec(spec, range(16)), limits=limits, memory_groups=groups))
"""


def test_two_processes_make_the_same_plan(capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever order their sets have: a rank must know what another one plans. The hash seed of this one is random."""
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", _PRINT_PLAN], env=environment, cwd=REPOSITORY, timeout=120, check=True)
    theirs = capfd.readouterr().out
    exec(_PRINT_PLAN, {})
    assert theirs == capfd.readouterr().out
    assert theirs.startswith("CooperativePlan(own=")
