"""Foretell what each rank of a spec will read: from every rank's plan where ranks are few, else from the plans of some.

Where each rank reads for itself, ranks that want the very same boxes (replicas) read the same, and one of them is planned. Where
ranks read for each other, they take turns. Of more kinds of ranks than are planned, some evenly spaced ones stand for their
neighbours: what a rank wants is known of each, what it reads is then taken to be in proportion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from shardferry.checkpoint.catalog import Catalog
from shardferry.checkpoint.open import opened_storage
from shardferry.layout.spec import SpecLayout
from shardferry.plan.cooperative import share_reads
from shardferry.plan.demand import Demand
from shardferry.plan.planner import LoadPlan, plan_load, planned_objects
from shardferry.plan.predict import predict_objects, predict_reads
from shardferry.plan.rank_layouts import SpecWants
from shardferry.plan.split import SlabLimits
from shardferry.read.coalesce import JoinLimits
from shardferry.read.execute import join_limits_of
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
    if not may_share:
        kinds = demand.twins
    reads = _reads(config, catalog, plans, SpecWants(layout, range(layout.world_size)) if may_share else None)
    places = np.searchsorted(chosen, kinds, side="right") - 1  # of its kind, else the nearest before it
    ranks = [_scaled(rank, demand, reads[place]) for rank, place in enumerate(places.tolist())]
    objects = planned_objects(catalog, request)
    bytes_read, num_requests = predict_objects(objects, catalog, join_limits(config, catalog))
    ranks[0] = _with_objects(ranks[0], sum(planned.nbytes for planned in objects), bytes_read, num_requests)
    return Forecast(ranks, may_share, len(plans), bool((chosen[places] != kinds).any()))


def _spaced(kinds: np.ndarray, most: int) -> np.ndarray:
    """At most so many of some ranks; the first is among them."""
    if len(kinds) <= most:
        return kinds
    return kinds[np.linspace(0, len(kinds) - 1, most).astype(np.int64)]


def _reads(config: StageConfig, catalog: Catalog, plans: Sequence[LoadPlan], wants: SpecWants | None) -> list[_Reads]:
    """Of each plan's rank; it reads for itself where there are no wants of others."""
    limits = join_limits(config, catalog)
    slabs = SlabLimits.of(_traits(catalog), limits)
    found = []
    for plan in plans:
        shared = None if wants is None else share_reads(plan, catalog, wants, slabs=slabs)
        nbytes, num_requests = predict_reads(plan, catalog, limits, shared)
        sent, received = (0, 0) if shared is None else (shared.bytes_sent, shared.bytes_received)
        found.append(_Reads(plan.bytes_needed, nbytes, sent, received, num_requests))
    return found


def join_limits(config: StageConfig, catalog: Catalog) -> JoinLimits:
    """How the spec, or else the kind of storage, wants reads joined and split."""
    return join_limits_of(_traits(catalog), config.read.options(config.timeouts.load_s))


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
