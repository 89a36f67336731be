"""Foretell what each rank of a spec will read: from every rank's plan where ranks are few, else from the plans of some.

Where each rank reads for itself, ranks that want the very same boxes (replicas) read the same, and one of them is planned. Where
ranks read for each other, they take turns. Of more kinds of ranks than are planned, some evenly spaced ones stand for their
neighbours: what a rank wants is known of each, what it reads is then taken to be in proportion.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from shardferry.checkpoint.catalog import Catalog
from shardferry.checkpoint.open import opened_storage
from shardferry.config import ReadLimits
from shardferry.layout.spec import SpecLayout
from shardferry.plan.cooperative import assign_reads
from shardferry.plan.demand import Demand
from shardferry.plan.load_plan import LoadPlan
from shardferry.plan.planner import plan_load, planned_objects
from shardferry.plan.rank_layouts import LayoutsFromSpec
from shardferry.read.schedule import count_objects, requests_of_plan
from shardferry.region import Region, first_overlap, uncovered
from shardferry.schemas.plan_report import RankPlan
from shardferry.schemas.stage_config import StageConfig
from shardferry.storage.base import StorageTraits

MOST_PLANNED = 32  # ranks; one of the largest models takes a second


@dataclass(frozen=True, slots=True)
class Forecast:
    """What each rank will read, and how well that is known."""

    ranks: list[RankPlan]
    is_cooperative: bool
    ranks_planned: int
    estimated: bool  # for some rank from the plan of one that reads otherwise


@dataclass(frozen=True, slots=True)
class _Reads:
    """What one rank's plan asks of storage and of other ranks, in bytes; Python objects apart."""

    needed: int
    read: int
    sent: int
    received: int
    num_requests: int


def forecast(
    config: StageConfig, catalog: Catalog, layout: SpecLayout, demand: Demand, *, most_planned: int = MOST_PLANNED
) -> Forecast:
    """Foretell all ranks' reads. Raises PlanError, LayoutError as `plan_load` does."""
    may_share = config.read.strategy != "direct" and layout.world_size > 1
    kinds = np.arange(layout.world_size) if may_share else demand.twins
    chosen = _spaced(np.unique(kinds), most_planned)
    request = config.checkpoint.request()
    plans = [replace(plan_load(catalog, layout.rank(rank), request), objects=()) for rank in chosen.tolist()]
    is_cooperative = may_share and not (config.read.strategy == "auto" and _traits(catalog).is_local)
    if not is_cooperative:
        kinds = demand.twins
    reads = _reads(
        config, catalog, plans, LayoutsFromSpec(layout, range(layout.world_size)) if is_cooperative else None
    )
    places = np.searchsorted(chosen, kinds, side="right") - 1  # of its kind, else the nearest before it
    ranks = [_scaled(rank, demand, reads[place]) for rank, place in enumerate(places.tolist())]
    objects = planned_objects(catalog, request)
    bytes_read, num_requests = count_objects(
        catalog, [planned.key for planned in objects], read_limits(config, catalog)
    )
    ranks[0] = _with_objects(ranks[0], sum(planned.nbytes for planned in objects), bytes_read, num_requests)
    return Forecast(ranks, may_share, len(plans), bool((chosen[places] != kinds).any()))


def _spaced(kinds: np.ndarray, most: int) -> np.ndarray:
    """At most so many of some ranks; the first is among them."""
    if len(kinds) <= most:
        return kinds
    return kinds[np.linspace(0, len(kinds) - 1, most).astype(np.int64)]


def _reads(
    config: StageConfig, catalog: Catalog, plans: Sequence[LoadPlan], layouts: LayoutsFromSpec | None
) -> list[_Reads]:
    """The reads of each plan's rank; without the layouts of the others it reads for itself."""
    limits = read_limits(config, catalog)
    split, found = _traits(catalog).split_limits(limits), []
    for plan in plans:
        cooperative = None if layouts is None else assign_reads(plan, catalog, layouts, limits=split)
        nbytes, num_requests = requests_of_plan(plan, catalog, limits, cooperative)
        sent, received = (0, 0) if cooperative is None else (cooperative.bytes_sent, cooperative.bytes_received)
        found.append(_Reads(plan.bytes_needed, nbytes, sent, received, num_requests))
    return found


def read_limits(config: StageConfig, catalog: Catalog) -> ReadLimits:
    """How far the spec, or else the kind of storage, lets reads be coalesced."""
    return _traits(catalog).read_limits(config.read.options(config.timeouts.load_s))


def _traits(catalog: Catalog) -> StorageTraits:
    with opened_storage(catalog) as storage:
        return storage.traits


def _scaled(rank: int, demand: Demand, like: _Reads) -> RankPlan:
    """A rank that reads as another does, in proportion to what both want."""
    needed = int(demand.needed[rank])
    ratio = needed / like.needed if like.needed else 1.0

    def scaled(count: int) -> int:
        return count if needed == like.needed else round(count * ratio)

    return RankPlan(
        rank=rank,
        bytes_needed=needed,
        bytes_read=scaled(like.read),
        bytes_sent=scaled(like.sent),
        bytes_received=scaled(like.received),
        num_requests=scaled(like.num_requests),
        arena_bytes=int(demand.arena[rank]),
    )


def _with_objects(rank: RankPlan, bytes_needed: int, bytes_read: int, num_requests: int) -> RankPlan:
    """Rank 0 reads the Python objects for all."""
    return rank.model_copy(
        update={
            "bytes_needed": rank.bytes_needed + bytes_needed,
            "bytes_read": rank.bytes_read + bytes_read,
            "num_requests": rank.num_requests + num_requests,
        }
    )


def union_numel(regions: Iterable[Region]) -> int:
    """The number of elements in the union of some regions of one tensor; an element in several regions counts once."""
    boxes = sorted(set(regions))
    if not boxes:
        return 0
    offsets = np.array([box.offsets for box in boxes], dtype=np.int64).reshape(len(boxes), -1)
    sizes = np.array([box.sizes for box in boxes], dtype=np.int64).reshape(len(boxes), -1)
    if first_overlap(offsets, sizes) is None:
        return sum(box.numel for box in boxes)
    disjoint: list[Region] = []
    for box in boxes:
        disjoint += uncovered(box, disjoint)
    return sum(box.numel for box in disjoint)
