"""Dry run: from a spec and a checkpoint's metadata, predict what each rank will read.

With few ranks, every rank is planned and the numbers are exact. With many ranks:

- Direct reads: ranks with identical boxes (replicas) read the same, and one of them is planned.
- Cooperative reads: replicas take turns, and each rank reads something else.
- Where more ranks differ than are planned, evenly spaced ranks are planned. Another rank's needed bytes are exact; its reads
  are scaled from the planned rank before it, in proportion to the needed bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from shardferry.checkpoint.catalog import Catalog
from shardferry.checkpoint.open import opened_storage
from shardferry.checkpoint.optimizer_state import index_optimizer
from shardferry.config import ReadLimits
from shardferry.layout.spec import SpecLayout
from shardferry.pipeline.dry_run.demand import Demand, demand_of, object_bytes, read_amplification
from shardferry.pipeline.inspect import saved_topology
from shardferry.pipeline.preflight import check_topology, target_layout
from shardferry.pipeline.versions import made_by
from shardferry.plan.cooperative import assign_reads
from shardferry.plan.load_plan import LoadPlan
from shardferry.plan.planner import plan_load, planned_objects
from shardferry.plan.rank_layouts import LayoutsFromSpec
from shardferry.read.schedule import count_objects, requests_of_plan
from shardferry.schemas.plan_report import Balance, PlanReport, RankPlan, max_over_mean
from shardferry.schemas.stage_config import StageConfig
from shardferry.storage.base import StorageTraits

MAX_PLANNED = 32  # ranks; the plan of one rank of the largest models takes up to a second


@dataclass(frozen=True, slots=True)
class Forecast:
    """What each rank will read, and how exact the numbers are."""

    ranks: list[RankPlan]
    is_cooperative: bool
    reason: str  # why
    num_planned: int  # ranks
    is_estimated: bool  # the reads of some rank are scaled from those of a rank with other boxes


@dataclass(frozen=True, slots=True)
class _Reads:
    """What one planned rank reads, in bytes, without Python objects."""

    needed: int
    read: int
    sent: int
    received: int
    num_requests: int


def plan_report(config: StageConfig, catalog: Catalog, *, request_latency_s: float = 0.0) -> PlanReport:
    """Predict a load from the metadata alone.

    Args:
        request_latency_s: how long a request waits for its first byte.

    Raises:
        PlanError, LayoutError: the checkpoint doesn't cover what the topology needs.
        SpecError: the spec has no topology.
    """
    layout = target_layout(config)
    request = config.checkpoint.request()
    demand = demand_of(catalog, layout, request)
    found = forecast(config, catalog, layout, demand)
    if found.is_estimated:  # a plan proves the cover of its own rank, and of ranks with identical boxes
        check_topology(catalog, layout, request)
    unique = demand.unique + object_bytes(catalog, request)
    planned = sum(rank.bytes_read for rank in found.ranks)
    options = config.read.options(config.timeouts.load_s)
    in_flight = min(options.memory_budget, options.concurrency * read_limits(config, catalog).max_request_bytes)
    waits = -(-max(rank.num_requests for rank in found.ranks) // options.concurrency)
    bandwidth = config.read.storage_bandwidth
    return PlanReport(
        location=catalog.location,
        model_location=catalog.model_location or None,
        optimizer_key=request.optimizer_key,
        world_size=layout.world_size,
        mesh=dict(layout.mesh.axes),
        num_tensors=demand.num_tensors,
        unique_bytes_needed=unique,
        storage_bytes_planned=planned,
        read_amplification=read_amplification(planned, unique),
        num_requests=sum(rank.num_requests for rank in found.ranks),
        peak_memory_bytes=max(rank.arena_bytes for rank in found.ranks) + in_flight,
        strategy="cooperative" if found.is_cooperative else "direct",
        strategy_reason=found.reason,
        ranks_planned=found.num_planned,
        estimated=found.is_estimated,
        balance=Balance(
            bytes_needed=max_over_mean([rank.bytes_needed for rank in found.ranks]),
            bytes_read=max_over_mean([rank.bytes_read for rank in found.ranks]),
            files=max_over_mean(demand.of_files[demand.of_files > 0].tolist()),
        ),
        lower_bound_s=unique / bandwidth if bandwidth else None,
        predicted_s=planned / bandwidth + waits * request_latency_s if bandwidth else None,
        warnings=[catalog.stale] if catalog.stale else [],
        saved_as=saved_topology(catalog),
        file_bytes={path: n for path, n in zip(catalog.files, demand.of_files.tolist(), strict=True) if n},
        ranks=found.ranks,
        **made_by(),
    )


def forecast(
    config: StageConfig, catalog: Catalog, layout: SpecLayout, demand: Demand, *, max_planned: int = MAX_PLANNED
) -> Forecast:
    """Predict the reads of all ranks.

    Args:
        demand: of all ranks, by `demand_of`.
        max_planned: ranks that are planned at most.

    Raises:
        PlanError, LayoutError: as `plan_load` does.
    """
    may_share = config.read.strategy != "direct" and layout.world_size > 1
    stand_in = np.arange(layout.world_size) if may_share else demand.first_equal
    chosen = _evenly_spaced(np.unique(stand_in), max_planned)
    request = config.checkpoint.request()
    plans = [replace(plan_load(catalog, layout.rank(rank), request), objects={}) for rank in chosen.tolist()]
    is_cooperative, reason = _strategy(config, catalog, layout)
    if not is_cooperative:
        stand_in = demand.first_equal
    layouts = LayoutsFromSpec(layout, range(layout.world_size)) if is_cooperative else None
    reads = _reads(config, catalog, plans, layouts)
    places = np.searchsorted(chosen, stand_in, side="right") - 1  # the stand-in itself, else the planned rank before it
    ranks = [_scaled(rank, demand, reads[place]) for rank, place in enumerate(places.tolist())]
    objects = planned_objects(catalog, request, index_optimizer(catalog, request.optimizer_key))
    bytes_read, num_requests = count_objects(catalog, objects, read_limits(config, catalog))
    ranks[0] = _with_objects(
        ranks[0],
        bytes_needed=sum(objects.values()),
        bytes_read=bytes_read,
        num_requests=num_requests,
    )
    return Forecast(ranks, is_cooperative, reason, len(plans), bool((chosen[places] != stand_in).any()))


def _strategy(config: StageConfig, catalog: Catalog, layout: SpecLayout) -> tuple[bool, str]:
    """Whether ranks read for each other, and why. A run knows its nodes and decides for itself."""
    if layout.world_size == 1:
        return False, "there is one rank"
    if config.read.strategy != "auto":
        return config.read.strategy == "cooperative", "as asked"
    if _traits(catalog).is_local:
        return False, "the checkpoint is in local files, and the ranks are taken to be on one node"
    return True, "ranks read for each other, and each byte leaves the storage once"


def read_limits(config: StageConfig, catalog: Catalog) -> ReadLimits:
    """How far byte ranges are coalesced: by the spec, or else by the kind of storage."""
    return _traits(catalog).read_limits(config.read.options(config.timeouts.load_s))


def _traits(catalog: Catalog) -> StorageTraits:
    with opened_storage(catalog) as storage:
        return storage.traits


def _evenly_spaced(ranks: np.ndarray, most: int) -> np.ndarray:
    """At most ``most`` of the ranks, with the first among them."""
    if len(ranks) <= most:
        return ranks
    return ranks[np.linspace(0, len(ranks) - 1, most).astype(np.int64)]


def _reads(
    config: StageConfig, catalog: Catalog, plans: Sequence[LoadPlan], layouts: LayoutsFromSpec | None
) -> list[_Reads]:
    """The reads of each planned rank: cooperative with the layouts of all ranks, direct without them."""
    limits = read_limits(config, catalog)
    split, found = _traits(catalog).split_limits(limits), []
    for plan in plans:
        cooperative = None if layouts is None else assign_reads(plan, catalog, layouts, limits=split)
        nbytes, num_requests = requests_of_plan(plan, catalog, limits, cooperative)
        sent, received = (0, 0) if cooperative is None else (cooperative.bytes_sent, cooperative.bytes_received)
        found.append(
            _Reads(needed=plan.bytes_needed, read=nbytes, sent=sent, received=received, num_requests=num_requests)
        )
    return found


def _scaled(rank: int, demand: Demand, planned: _Reads) -> RankPlan:
    """A rank's numbers from those of a planned rank, in proportion to the bytes that both need."""
    needed = int(demand.needed[rank])
    ratio = needed / planned.needed if planned.needed else 1.0

    def scaled(count: int) -> int:
        return count if needed == planned.needed else round(count * ratio)

    return RankPlan(
        rank=rank,
        bytes_needed=needed,
        bytes_read=scaled(planned.read),
        bytes_sent=scaled(planned.sent),
        bytes_received=scaled(planned.received),
        num_requests=scaled(planned.num_requests),
        arena_bytes=int(demand.arena[rank]),
    )


def _with_objects(rank: RankPlan, *, bytes_needed: int, bytes_read: int, num_requests: int) -> RankPlan:
    """Rank 0's numbers with the Python objects, which it reads for all."""
    return rank.model_copy(
        update={
            "bytes_needed": rank.bytes_needed + bytes_needed,
            "bytes_read": rank.bytes_read + bytes_read,
            "num_requests": rank.num_requests + num_requests,
        }
    )
