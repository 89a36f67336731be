"""The dry run: what each rank of a stage will read, from the checkpoint's metadata alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from schemas.plan_report import PlanReport, RankPlan
from schemas.stage_config import StageConfig
from shardferry.catalog import Catalog
from shardferry.checkpoint import storage_of
from shardferry.errors import SpecError
from shardferry.extents import JoinLimits
from shardferry.layout import RankLayout
from shardferry.neighbours import slab_bytes
from shardferry.optimizer_index import index_optimizer
from shardferry.plan import LoadPlan, covering_chunks, plan_load, saved_weights
from shardferry.predict import predict_reads
from shardferry.probe import answers_from_memory
from shardferry.reader import check_files
from shardferry.region import Region, union_numel
from shardferry.request import LoadRequest
from shardferry.requests import MAX_REQUEST
from shardferry.sharing import SharedPlan, share_reads
from shardferry.spec_layout import SpecLayout
from shardferry.wants import SpecWants


def target_layout(config: StageConfig) -> SpecLayout:
    """The spec's topology. Raises SpecError where it has none."""
    if config.topology is None:
        raise SpecError("topology: missing; give mesh and placements, or trainers to ask for their layout")
    return config.topology.layout()


def check_checkpoint(catalog: Catalog, request: LoadRequest) -> None:
    """Refuse a checkpoint before anything starts: no such optimizer, or files that are missing or cut.

    Raises:
        PlanError: nothing is saved under the key.
        StorageError: a file is missing or short.
    """
    keys = _wanted_keys(catalog, request)
    storage = storage_of(catalog)
    try:
        check_files(catalog, keys, storage)
    finally:
        storage.close()


def _wanted_keys(catalog: Catalog, request: LoadRequest) -> list[str]:
    index = index_optimizer(catalog, request.optimizer_key)
    weights = [] if request.model_key is None else list(saved_weights(catalog, request, index).values())
    return [*index.all_keys(), *weights]


def check_topology(catalog: Catalog, layout: SpecLayout, request: LoadRequest) -> None:
    """Refuse a topology that the checkpoint's tensors can't have, before anything starts.

    Raises:
        PlanError: a hole or an overlap anywhere in the optimizer's state.
        LayoutError: a placement that a tensor can't have.
    """
    for key in _wanted_keys(catalog, request):
        if (saved := catalog.tensors.get(key)) is not None:
            covering_chunks(catalog, saved, Region.whole(saved.shape))
    plan_load(catalog, layout.rank(0), request)


def plan_report(config: StageConfig, catalog: Catalog) -> PlanReport:
    """Plan every rank. Raises PlanError, LayoutError, SpecError."""
    layout = target_layout(config)
    request = config.checkpoint.request()
    plans = plan_all(catalog, [layout.rank(rank) for rank in range(layout.world_size)], request)
    shared = _shared(config, catalog, layout, plans)
    limits = _limits(config, catalog)
    ranks = [_rank_plan(plan, catalog, limits, part) for plan, part in zip(plans, shared, strict=True)]
    unique = unique_bytes_needed(plans)
    planned = sum(rank.bytes_read for rank in ranks)
    in_flight = config.read.options(config.timeouts.load_s).concurrency * MAX_REQUEST
    bandwidth = config.read.storage_bandwidth
    return PlanReport(
        location=catalog.location,
        optimizer_key=request.optimizer_key,
        world_size=layout.world_size,
        mesh=dict(layout.mesh.axes),
        num_tensors=len(plans[0].tensors),
        unique_bytes_needed=unique,
        storage_bytes_planned=planned,
        read_amplification=amplification(planned, unique),
        num_requests=sum(rank.num_requests for rank in ranks),
        peak_memory_bytes=max(rank.arena_bytes for rank in ranks) + in_flight,
        lower_bound_s=unique / bandwidth if bandwidth else None,
        ranks=ranks,
    )


def _shared(
    config: StageConfig, catalog: Catalog, layout: SpecLayout, plans: Sequence[LoadPlan]
) -> list[SharedPlan | None]:
    """Each rank's part of the reads, were all ranks on one node: what a dry run can't know."""
    if config.read.strategy == "direct" or len(plans) < 2:
        return [None] * len(plans)
    if config.read.strategy == "auto" and _all_in_memory(catalog, plans):
        return [None] * len(plans)
    wants = SpecWants(layout, range(len(plans)))
    return [share_reads(plan, catalog, wants, max_slab_bytes=slab_bytes(catalog)) for plan in plans]


def _all_in_memory(catalog: Catalog, plans: Sequence[LoadPlan]) -> bool:
    storage = storage_of(catalog)
    try:
        return all(answers_from_memory(plan, catalog, storage) for plan in plans)
    finally:
        storage.close()


def _limits(config: StageConfig, catalog: Catalog) -> JoinLimits:
    options, storage = config.read.options(config.timeouts.load_s), storage_of(catalog)
    try:
        return JoinLimits.of(
            storage.traits, max_gap_bytes=options.max_gap_bytes, max_request_bytes=options.max_request_bytes
        )
    finally:
        storage.close()


def _rank_plan(plan: LoadPlan, catalog: Catalog, limits: JoinLimits, shared: SharedPlan | None) -> RankPlan:
    nbytes, num_requests = predict_reads(plan, catalog, limits, shared)
    return RankPlan(
        rank=plan.world_rank,
        bytes_needed=plan.bytes_needed,
        bytes_read=nbytes,
        bytes_sent=0 if shared is None else shared.bytes_sent,
        bytes_received=0 if shared is None else shared.bytes_received,
        num_requests=num_requests,
        arena_bytes=plan.arena_bytes,
    )


def plan_all(
    catalog: Catalog, layouts: Sequence[RankLayout], request: LoadRequest, values: Mapping[str, Any] | None = None
) -> list[LoadPlan]:
    """The plans of all ranks. Raises PlanError, LayoutError."""
    return [plan_load(catalog, layout, request, values) for layout in layouts]


def unique_bytes_needed(plans: Iterable[LoadPlan]) -> int:
    """Bytes that some rank needs, each once."""
    regions: dict[str, set[Region]] = defaultdict(set)
    itemsize: dict[str, int] = {}
    objects: dict[str, int] = {}
    for plan in plans:
        for tensor in plan.tensors:
            itemsize[tensor.key] = tensor.dtype.itemsize
            regions[tensor.key].update(box.region for box in tensor.layout.boxes)
        objects.update({planned.key: planned.nbytes for planned in plan.objects})
    return sum(union_numel(boxes) * itemsize[key] for key, boxes in regions.items()) + sum(objects.values())


def amplification(nbytes: int, unique: int) -> float:
    """Bytes out of storage over the bytes that are needed."""
    return nbytes / unique if unique else 1.0
