"""Read an optimizer's state in ranges of the checkpoint's files, straight into the local tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import StorageReader

from shardferry.arena import allocate_arena
from shardferry.checkpoint.catalog import Catalog
from shardferry.checkpoint.open import read_catalog
from shardferry.dcp.groups import device_of
from shardferry.dcp.key_paths import nest_optimizer, optimizer_paths
from shardferry.dcp.storages import storage_of
from shardferry.dcp.targets import SavedState, Target, targets_of
from shardferry.exchange.agreement import Agreement
from shardferry.plan.planner import plan_tensors
from shardferry.read.execute import Counters, ReadOptions, read_object, read_plan
from shardferry.state_dicts import KeyPath
from shardferry.storage.base import RangeReader


def load_ranged(
    model: Mapping[str, Any], optimizer_key: str, reader: StorageReader, group: dist.ProcessGroup, agreement: Agreement
) -> dict[str, Any]:
    """See `shardferry.dcp.load_sharded_optimizer_state_dict`; all ranks of the agreement must call it."""
    storage = agreement.attempt("opening the checkpoint", lambda: storage_of(reader))
    try:
        catalog = agreement.from_first("reading the metadata", lambda: read_catalog(storage))
        storage.expect(catalog.file_versions)
        paths, targets = agreement.attempt("planning", lambda: _targets(catalog, optimizer_key, model, group))
        values = agreement.attempt(
            "loading", lambda: _read(catalog, storage, paths, targets, device_of(group), agreement)
        )
    finally:
        storage.close()
    return nest_optimizer(paths, values, optimizer_key)


def _targets(
    catalog: Catalog, optimizer_key: str, model: Mapping[str, Any], group: dist.ProcessGroup
) -> tuple[dict[str, KeyPath], list[Target]]:
    keys = [*catalog.tensors, *catalog.objects]
    paths = optimizer_paths(keys, catalog.paths, optimizer_key, location=catalog.location)
    saved = [catalog.tensors[key] for key in paths if key in catalog.tensors]
    states = [SavedState(tensor.key, paths[tensor.key], tensor.shape, tensor.dtype) for tensor in saved]
    return paths, targets_of(states, model, group)


def _read(
    catalog: Catalog,
    storage: RangeReader,
    paths: Mapping[str, KeyPath],
    targets: Sequence[Target],
    device: torch.device,
    agreement: Agreement,
) -> dict[str, Any]:
    wanted = [(target.key, layout) for target in targets for layout in target.layouts]
    plan = plan_tensors(catalog, wanted, world_rank=agreement.rank, world_size=agreement.size)
    arena, counters = allocate_arena(plan.arena_bytes, device), Counters()
    read_plan(plan, catalog, storage, arena, ReadOptions(), counters)
    local = iter([arena.tensor(t.arena_offset, t.layout.local_shape, t.dtype) for t in plan.tensors])
    tensors = {target.key: target.result([next(local) for _ in target.layouts]) for target in targets}
    objects = {key: read_object(catalog, key, storage, counters) for key in paths if key in catalog.objects}
    return {key: tensors[key] if key in tensors else objects[key] for key in paths}
