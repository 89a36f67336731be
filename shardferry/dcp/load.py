"""Load a checkpoint's optimizer state, cut as the model's parameters are cut now."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, StorageReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from torch.distributed.checkpoint.planner import LoadPlanner

from shardferry.agreement import Agreement
from shardferry.arena import allocate_arena
from shardferry.catalog import Catalog, KeyPath
from shardferry.checkpoint import open_checkpoint
from shardferry.dcp.groups import device_of, world
from shardferry.dcp.reader_with_offset import ReaderWithOffset
from shardferry.dcp.targets import Target, target_of
from shardferry.errors import LayoutError, PlanError
from shardferry.nesting import nest
from shardferry.optimizer_index import index_optimizer
from shardferry.plan import plan_tensors
from shardferry.reader import Counters, ReadOptions, read_object, read_plan
from shardferry.storage.base import open_storage

_OBJECT = "<bytes_io>"  # stands where a planner puts a Python object


def load_sharded_optimizer_state_dict(
    model_state_dict: Mapping[str, Any],
    optimizer_key: str,
    storage_reader: StorageReader,
    planner: LoadPlanner | None = None,
    *,
    process_group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Load a checkpoint's optimizer state, cut as the model's parameters are cut now.

    Args:
        model_state_dict: the sharded state dict of the model, by FQN. State with its parameter's shape comes as the
            parameter stands here: a ShardedTensor over the same process group, or a DTensor on the same mesh. Where it
            stands as a plain tensor or not at all, as a ShardedTensor cut along dimension 0 over the process group.
        optimizer_key: the optimizer's key in the state dict that was saved.
        storage_reader: any. torch's FileSystemReader is read in ranges by Shardferry, others by their own code.
        planner: any; where one is given, its own code plans.
        process_group: default: the whole job.

    Returns:
        ``{optimizer_key: {"state": {fqn: {name: tensor}}, "param_groups": [...]}}``.

    Raises:
        PlanError: nothing is saved under the key; an element is in no saved chunk, or in two.
        LayoutError: the model's tensors lie in a way that isn't supported.
        RankError: another rank failed.
    """
    group = process_group or world()
    agreement = Agreement(group)
    directory = _directory_of(storage_reader) if _plans_as_torch(planner) else None
    if directory is not None:
        return _load_ranged(model_state_dict, optimizer_key, directory, group, agreement)
    return _load_by_reader(model_state_dict, optimizer_key, storage_reader, planner, group, agreement)


def _directory_of(reader: StorageReader) -> str | None:
    """The directory of a reader whose files we can read ourselves."""
    return os.fspath(reader.path) if type(reader) is FileSystemReader else None


def _plans_as_torch(planner: LoadPlanner | None) -> bool:
    """Whether a planner does what torch does by default, so that ours may stand in for it."""
    if planner is None:
        return True
    return type(planner) is DefaultLoadPlanner and not planner.allow_partial_load


def _load_ranged(
    model: Mapping[str, Any], optimizer_key: str, directory: str, group: dist.ProcessGroup, agreement: Agreement
) -> dict[str, Any]:
    def prepare() -> tuple[Catalog, dict[str, KeyPath], list[Target]]:
        catalog = open_checkpoint(directory)
        paths = {
            key: _path_of(catalog, optimizer_key, key) for key in index_optimizer(catalog, optimizer_key).all_keys()
        }
        saved = {key: catalog.tensors[key] for key in paths if key in catalog.tensors}
        targets = [target_of(key, paths[key], t.shape, t.dtype, model, group) for key, t in saved.items()]
        return catalog, paths, targets

    catalog, paths, targets = agreement.attempt("planning", prepare)
    wanted = [(target.key, layout) for target in targets for layout in target.layouts]

    def read() -> dict[str, Any]:
        plan = plan_tensors(catalog, wanted, world_rank=agreement.rank, world_size=agreement.size)
        arena = allocate_arena(plan.arena_bytes, device_of(group))
        storage, counters = open_storage(directory), Counters()
        try:
            read_plan(plan, catalog, storage, arena, ReadOptions(), counters)
            values = {k: read_object(catalog, k, storage, counters) for k in paths if k in catalog.objects}
        finally:
            storage.close()
        local = iter([arena.tensor(t.arena_offset, t.layout.local_shape, t.dtype) for t in plan.tensors])
        locals_of = {target.key: [next(local) for _ in target.layouts] for target in targets}
        return values | {target.key: target.build(locals_of[target.key]) for target in targets}

    values = agreement.attempt("loading", read)
    nested: dict[str, Any] = nest({paths[key]: values[key] for key in paths})
    return nested


def _path_of(catalog: Catalog, optimizer_key: str, key: str) -> KeyPath:
    """Where a value stood when it was saved; where that was not recorded, at the optimizer's usual places."""
    path = catalog.path(key)
    if len(path) > 1:
        return path
    tail = key.removeprefix(optimizer_key + ".")
    section, _, rest = tail.partition(".")
    fqn, _, name = rest.rpartition(".")
    return (optimizer_key, section, fqn, name) if section == "state" and fqn else (optimizer_key, tail)


def _load_by_reader(
    model: Mapping[str, Any],
    optimizer_key: str,
    reader: StorageReader,
    planner: LoadPlanner | None,
    group: dist.ProcessGroup,
    agreement: Agreement,
) -> dict[str, Any]:
    def prepare() -> tuple[dict[str, KeyPath], list[Target], dict[str, Any]]:
        metadata = reader.read_metadata()
        paths = _paths_in(metadata, optimizer_key)
        state_dict: dict[str, Any] = {}
        targets = []
        for key in paths:
            saved = metadata.state_dict_metadata[key]
            if isinstance(saved, BytesStorageMetadata):
                state_dict[key] = _OBJECT
                continue
            shape, dtype = tuple(saved.size), saved.properties.dtype
            target = target_of(key, paths[key], shape, dtype, model, group)
            empty = [torch.empty(layout.local_shape, dtype=dtype, device=device_of(group)) for layout in target.layouts]
            state_dict[key] = target.build(empty)
            targets.append(target)
        return paths, targets, state_dict

    paths, targets, state_dict = agreement.attempt("planning", prepare)
    offsets = {target.key: target.read_offset for target in targets if target.read_offset is not None}
    if offsets and planner is not None:
        raise LayoutError(
            f"{next(iter(offsets))}: is nested (FSDP1 over TP), and {type(planner).__name__} can't read at an offset; "
            "leave planner out"
        )
    dcp.load(
        state_dict,
        storage_reader=reader,
        planner=ReaderWithOffset(offsets) if offsets else planner,
        process_group=group,
    )
    nested: dict[str, Any] = nest({paths[key]: state_dict[key] for key in paths})
    return nested


def _paths_in(metadata: Metadata, optimizer_key: str) -> dict[str, KeyPath]:
    """The optimizer's keys, and where their values stood."""
    recorded = metadata.planner_data or {}
    paths: dict[str, KeyPath] = {}
    for key in metadata.state_dict_metadata:
        path = tuple(recorded.get(key, (key,)))
        if len(path) == 1 and key.startswith(optimizer_key + ".state."):
            fqn, _, name = key.removeprefix(optimizer_key + ".state.").rpartition(".")
            path = (optimizer_key, "state", fqn, name)
        if path[0] == optimizer_key:
            paths[key] = path
    if not paths:
        there = sorted({str(recorded.get(key, (key,))[0]) for key in metadata.state_dict_metadata})
        raise PlanError(
            f"nothing is saved under optimizer_key {optimizer_key!r}; top-level keys are {', '.join(there)}"
        )
    return paths
