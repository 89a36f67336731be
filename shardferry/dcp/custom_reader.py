"""Load an optimizer's state through `dcp.load`, with any reader and any planner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import StorageReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlanner

from shardferry.checkpoint.catalog import Catalog
from shardferry.checkpoint.from_torch import catalog_from_torch
from shardferry.dcp.planner import ReaderWithOffset
from shardferry.dcp.sharded_tensors import device_of
from shardferry.dcp.targets import ResultPlan, plan_result
from shardferry.errors import CatalogError, CheckpointNotFound, PlanError, RankError, ShardferryError
from shardferry.exchange.agreement import Agreement
from shardferry.plan.cover import covering_chunks

_OBJECT = "<bytes_io>"  # in the place of a Python object, for the planner to replace


def load_with_reader(
    model: Mapping[str, Any],
    optimizer_key: str,
    reader: StorageReader,
    planner: LoadPlanner | None,
    *,
    group: dist.ProcessGroup,
    agreement: Agreement,
) -> dict[str, Any]:
    """See `shardferry.dcp.load_sharded_optimizer_state_dict`; all ranks of the agreement must call this."""
    device = device_of(group)

    def prepare() -> tuple[ResultPlan, dict[str, list[torch.Tensor]], dict[str, Any]]:
        catalog = _catalog_of(reader)
        plan = plan_result(catalog, optimizer_key, model, group)
        for target in plan.targets:
            for box in (box for layout in target.layouts for box in layout.boxes):
                covering_chunks(catalog, catalog.tensors[target.key], box.region)
        local = {
            target.key: [
                torch.empty(layout.local_shape, dtype=target.dtype, device=device) for layout in target.layouts
            ]
            for target in plan.targets
        }
        return plan, local, {target.key: target.for_planner(local[target.key]) for target in plan.targets}

    plan, local, given = agreement.all_or_raise("planning", prepare)
    planner = planner or ReaderWithOffset({})
    values: dict[str, Any] = {key: given.get(key, _OBJECT) for key in plan.paths}
    try:
        dcp.load(values, storage_reader=reader, planner=planner, process_group=group)
    except CheckpointException as error:
        raise _error_of(error, dist.get_rank(group)) from error
    for target in plan.targets:
        if values.get(target.key) is given[target.key]:  # a planner may have put something else in its place
            values[target.key] = target.result(local[target.key])
    return plan.nested({key: _object_of(planner, key) if v is _OBJECT else v for key, v in values.items()})


def _catalog_of(reader: StorageReader) -> Catalog:
    location = str(getattr(reader, "checkpoint_id", None) or getattr(reader, "path", None) or type(reader).__name__)
    try:
        metadata = reader.read_metadata()
    except OSError as error:
        raise CheckpointNotFound(
            f"{location}: {type(reader).__name__} can't read the metadata ({error}). Give the place of a completed "
            "checkpoint; one that was saved without collectives is read by torch's own FileSystemReader without a planner"
        ) from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        raise CatalogError(
            f"{location}: {type(reader).__name__}.read_metadata gave a {type(metadata).__name__}, not a Metadata"
        )
    return catalog_from_torch(metadata, location=location)


def _error_of(failed: CheckpointException, own_rank: int) -> Exception:
    """Torch's error of all ranks as this rank's own error, or as one that names the ranks that failed."""
    causes = {rank: cause for rank, (cause, _) in failed.failures.items()}
    own = causes.get(own_rank)
    if isinstance(own, ShardferryError):
        return own
    ranks_by_message: dict[str, list[int]] = {}
    for rank, cause in sorted(causes.items()):
        ranks_by_message.setdefault(f"{type(cause).__name__}: {cause}", []).append(rank)
    parts = [f"rank {', '.join(map(str, ranks))}: {message}" for message, ranks in ranks_by_message.items()]
    return RankError(f"loading failed on {'; '.join(parts)}", sorted(causes))


def _object_of(planner: LoadPlanner, key: str) -> Any:
    """A Python object that is not in the state dict: torch's planner, when it does not flatten, keeps it in a copy."""
    value = getattr(planner, "state_dict", {}).get(key, _OBJECT)
    if value is _OBJECT:
        raise PlanError(
            f"{key}: {type(planner).__name__} left out this Python object; its load_bytes must put it into the state dict"
        )
    return value
