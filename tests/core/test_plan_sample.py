"""A sample of a plan against the whole plan."""

from __future__ import annotations

import pytest

from shardferry.checkpoint.catalog import Catalog
from shardferry.config import LoadRequest
from shardferry.layout.live import LiveLayout
from shardferry.layout.mesh import Shard
from shardferry.layout.tensor_layout import AxisCut, TensorLayout, sharded
from shardferry.plan import plan_sample
from shardferry.plan.cooperative import share_reads
from shardferry.plan.costs import Work
from shardferry.plan.plan_sample import PlanSample
from shardferry.plan.planner import LoadPlan, plan_load
from shardferry.plan.rank_layouts import ToldWants, told
from shardferry.plan.split import SlabLimits
from shardferry.read.coalesce import JoinLimits
from shardferry.region import Region
from shardferry.storage.base import OBJECT_STORE
from tests.support.catalogs import catalog_of

NUM_TENSORS, RANKS = 300, 6
LIMITS = JoinLimits.of(OBJECT_STORE, max_gap_bytes=None, max_request_bytes=None)


def layout(rank: int) -> TensorLayout:
    return sharded((96, 512), [AxisCut(RANKS, rank, Shard(0))])


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    """Tensors that 4 ranks saved; 6 want them."""
    rows = [Region((24 * rank, 0), (24, 512)) for rank in range(4)]
    return catalog_of({f"w{number:03}": ((96, 512), rows) for number in range(NUM_TENSORS)})


def plan_of(catalog: Catalog, rank: int) -> LoadPlan:
    names = [f"w{number:03}" for number in range(NUM_TENSORS)]
    return plan_load(catalog, LiveLayout(rank, RANKS, dict.fromkeys(names, layout(rank))), LoadRequest("optim"))


def test_of_a_small_plan_it_is_the_plan(catalog: Catalog) -> None:
    plan = plan_of(catalog, 0)
    assert PlanSample.of(plan) == PlanSample(plan)
    assert PlanSample.of(plan).is_whole


def test_it_is_taken_from_all_over_the_plan(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_sample, "_MOST_WHOLE", 200)
    monkeypatch.setattr(plan_sample, "_READS", 80)
    plan = plan_of(catalog, 1)  # of two files
    sample = PlanSample.of(plan)
    assert not sample.is_whole
    assert len(sample.plan.reads) == 80
    assert sample.plan.reads[0] == plan.reads[0]
    assert sample.plan.reads[-1] == plan.reads[-1]
    assert len({read.tensor * 4 // NUM_TENSORS for read in sample.plan.reads}) == 4
    assert sample.times_reads == len(plan.reads) / 80


@pytest.mark.parametrize("rank", [0, 1, 5])
@pytest.mark.parametrize("together", [False, True], ids=["direct", "cooperative"])
def test_it_costs_in_proportion(catalog: Catalog, rank: int, together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(catalog, rank)
    wants = ToldWants({other: told(plan_of(catalog, other)) for other in range(RANKS)})

    def work(sample: PlanSample) -> Work:
        shared = share_reads(sample.plan, catalog, wants, slabs=SlabLimits(1 << 23, 1 << 18)) if together else None
        return Work.of(sample, catalog, LIMITS, shared)

    whole = work(PlanSample.of(plan))
    monkeypatch.setattr(plan_sample, "_MOST_WHOLE", 200)
    monkeypatch.setattr(plan_sample, "_READS", 160)
    sample = PlanSample.of(plan)
    foretold = work(sample)
    assert foretold.bytes_read == pytest.approx(whole.bytes_read, rel=0.25)
    assert foretold.bytes_delivered == pytest.approx(whole.bytes_delivered, rel=0.3)
    # What would be one request is several, where blocks end: in each of the two files one a block.
    more = 2 * plan_sample._BLOCKS * sample.times_reads
    assert whole.num_requests / 3 <= foretold.num_requests <= whole.num_requests + more
