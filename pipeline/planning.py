"""Turn a stage's spec and a checkpoint's metadata into the report of a dry run, and refuse what can't be loaded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from shardferry.checkpoint.catalog import Catalog
from shardferry.checkpoint.open import opened_storage
from shardferry.checkpoint.optimizer_state import index_optimizer
from shardferry.config import LoadRequest
from shardferry.errors import SpecError
from shardferry.layout.spec import SpecLayout
from shardferry.layout.tensor_layout import RankLayout
from shardferry.pipeline.forecast import forecast, join_limits
from shardferry.plan.demand import demand_of
from shardferry.plan.planner import check_cover, plan_load, planned_objects, saved_weights, wanted_tensors
from shardferry.read.execute import check_files
from shardferry.region import Region, union_numel
from shardferry.schemas.plan_report import Balance, PlanReport
from shardferry.schemas.stage_config import StageConfig


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
    with opened_storage(catalog) as storage:
        check_files(catalog, keys, storage)


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
    keys = _wanted_keys(catalog, request)
    check_cover(catalog, [catalog.tensors[key] for key in keys if key in catalog.tensors])
    plan_load(catalog, layout.rank(0), request)


def plan_report(config: StageConfig, catalog: Catalog, *, request_latency_s: float = 0.0) -> PlanReport:
    """Foretell a load from the metadata alone. Raises PlanError, LayoutError, SpecError.

    Args:
        request_latency_s: how long a request waits for its first byte.
    """
    layout = target_layout(config)
    request = config.checkpoint.request()
    demand = demand_of(catalog, layout, request)
    found = forecast(config, catalog, layout, demand)
    if found.estimated:  # a plan proves what its own rank wants, and what wants the same boxes
        check_topology(catalog, layout, request)
    unique = demand.unique + object_bytes(catalog, request)
    planned = sum(rank.bytes_read for rank in found.ranks)
    options = config.read.options(config.timeouts.load_s)
    in_flight = min(options.memory_budget_bytes, options.concurrency * join_limits(config, catalog).max_request_bytes)
    waits = -(-max(rank.num_requests for rank in found.ranks) // options.concurrency)
    bandwidth = config.read.storage_bandwidth
    return PlanReport(
        location=catalog.location,
        optimizer_key=request.optimizer_key,
        world_size=layout.world_size,
        mesh=dict(layout.mesh.axes),
        num_tensors=demand.num_tensors,
        unique_bytes_needed=unique,
        storage_bytes_planned=planned,
        read_amplification=amplification(planned, unique),
        num_requests=sum(rank.num_requests for rank in found.ranks),
        peak_memory_bytes=max(rank.arena_bytes for rank in found.ranks) + in_flight,
        strategy="cooperative" if found.is_cooperative else "direct",
        ranks_planned=found.ranks_planned,
        estimated=found.estimated,
        balance=Balance(
            bytes_needed=_imbalance([rank.bytes_needed for rank in found.ranks]),
            bytes_read=_imbalance([rank.bytes_read for rank in found.ranks]),
            files=_imbalance(demand.of_files[demand.of_files > 0].tolist()),
        ),
        lower_bound_s=unique / bandwidth if bandwidth else None,
        predicted_s=planned / bandwidth + waits * request_latency_s if bandwidth else None,
        ranks=found.ranks,
    )


def _imbalance(counts: Sequence[int]) -> float:
    """The most over the mean."""
    total = sum(counts)
    return max(counts) * len(counts) / total if total else 1.0


def unique_bytes(
    catalog: Catalog, layouts: Sequence[RankLayout], request: LoadRequest, values: Mapping[str, Any] | None = None
) -> int:
    """Bytes that some rank needs, each once, from the ranks' layouts alone.

    Args:
        values: the saved Python values; only with its param groups is known what a live optimizer wants.
    """
    spec = layouts[0].spec
    if spec is not None:
        return demand_of(catalog, spec, request).unique + object_bytes(catalog, request)
    regions: dict[str, set[Region]] = defaultdict(set)
    itemsize: dict[str, int] = {}
    for layout in layouts:
        for tensor in wanted_tensors(catalog, layout, request, values):
            itemsize[tensor.key] = tensor.dtype.itemsize
            regions[tensor.key].update(box.region for box in tensor.layout.boxes)
    of_boxes: dict[frozenset[Region], int] = {}  # most tensors are cut as some other
    total = object_bytes(catalog, request)
    for key, boxes in regions.items():
        alike = frozenset(boxes)
        if alike not in of_boxes:
            of_boxes[alike] = union_numel(boxes)
        total += of_boxes[alike] * itemsize[key]
    return total


def object_bytes(catalog: Catalog, request: LoadRequest) -> int:
    """Bytes of the items that rank 0 reads for all."""
    return sum(planned.nbytes for planned in planned_objects(catalog, request))


def amplification(nbytes: int, unique: int) -> float:
    """Bytes out of storage over the bytes that are needed."""
    return nbytes / unique if unique else 1.0
