"""Load a checkpoint's optimizer state, sharded as the model's parameters are now.

Files of torch's own readers are read here, in byte ranges. Any other reader or planner does the work itself, in `dcp.load`
(custom_reader.py), after a proof that each wanted element was saved. Only this file looks into torch's readers;
tests/core/test_private_apis.py fails when torch changes them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, StorageReader
from torch.distributed.checkpoint._extension import ExtensionRegistry
from torch.distributed.checkpoint.planner import LoadPlanner

from shardferry.arena import allocate_arena
from shardferry.checkpoint.catalog import Catalog
from shardferry.checkpoint.open import read_catalog
from shardferry.config import ReadOptions
from shardferry.dcp.custom_reader import load_with_reader
from shardferry.dcp.sharded_tensors import device_of, group_of_call
from shardferry.dcp.targets import ResultPlan, plan_result
from shardferry.errors import CheckpointNotFound, SpecError
from shardferry.exchange.agreement import Agreement
from shardferry.plan.planner import plan_tensors
from shardferry.read.execute import read_objects, read_plan
from shardferry.stats import Counters
from shardferry.storage.base import RangeReader
from shardferry.storage.fsspec import FsspecRangeReader
from shardferry.storage.open import open_storage
from shardferry.storage.retry import RetryingReader

_FSSPEC = "torch.distributed.checkpoint._fsspec_filesystem"  # importing it needs fsspec


def load_sharded_optimizer_state_dict(
    model_state_dict: Mapping[str, Any],
    optimizer_key: str,
    storage_reader: StorageReader,
    planner: LoadPlanner | None = None,
    *,
    process_group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Load a checkpoint's optimizer state, sharded as the model's parameters are now.

    Args:
        model_state_dict: the sharded state dict of the model, by FQN. State with its parameter's shape gets the parameter's
            layout: a ShardedTensor over the same process group, a DTensor on the same mesh, or a plain tensor. State of a
            parameter that is not here is a ShardedTensor, sharded along dimension 0 over the process group. Every other
            tensor is whole.
        optimizer_key: the optimizer's key in the state dict that was saved.
        storage_reader: any. Files of torch's own file-system readers are read in byte ranges, all others by the reader.
        planner: any. Unless it is torch's default planner, its own code plans and places the reads. It gets a flat state
            dict: tensors to fill, each with its place in the saved tensor, and strings in the place of Python objects.
        process_group: all its ranks must call this; default: the whole job.

    Returns:
        ``{optimizer_key: {"state": {fqn: {name: tensor}}, "param_groups": [...]}}``.

    Raises:
        SpecError: an argument has the wrong type, ranks disagree on one, or torch.distributed is not initialised.
        CheckpointNotFound: rank 0 finds no checkpoint; on all ranks.
        PlanError: nothing is saved under the key, or an element is in no saved chunk or in two.
        LayoutError: a tensor of the model has a layout that is not supported.
        RankError: another rank failed, or the reader's or the planner's code did.
    """
    group = group_of_call(process_group)
    agreement = Agreement(group)
    if _agree_on_ranges(agreement, model_state_dict, optimizer_key, storage_reader, planner):
        return _load_ranges(model_state_dict, optimizer_key, storage_reader, group=group, agreement=agreement)
    return load_with_reader(model_state_dict, optimizer_key, storage_reader, planner, group=group, agreement=agreement)


def has_ranges(reader: StorageReader) -> bool:
    """Whether a reader's files can be read without it: it is exactly one of torch's own.

    A subclass may change how bytes are read, and only the owner of an extension can undo what it did to them.
    """
    if type(reader) is not FileSystemReader and not _is_fsspec(reader):
        return False
    assert isinstance(reader, FileSystemReader)
    registry = reader.transforms.extension_registry
    return type(registry) is ExtensionRegistry and registry.extensions == ExtensionRegistry().extensions


def _is_fsspec(reader: StorageReader) -> bool:
    module: Any = sys.modules.get(_FSSPEC)  # whoever made such a reader has imported it
    return module is not None and type(reader) is module.FsspecReader


def _agree_on_ranges(agreement: Agreement, model: Any, optimizer_key: Any, reader: Any, planner: Any) -> bool:
    """Check the arguments, and decide whether to read byte ranges: the same, or an error, on all ranks."""

    def check() -> tuple[str, bool, str]:
        for name, value, kind, words in (
            ("model_state_dict", model, Mapping, "a state dict"),
            ("optimizer_key", optimizer_key, str, "a string"),
            ("storage_reader", reader, StorageReader, "a StorageReader"),
            ("planner", planner, LoadPlanner | None, "a LoadPlanner or None"),
        ):
            if not isinstance(value, kind):
                raise SpecError(f"{name}: is a {type(value).__name__}, not {words}")
        ranges = has_ranges(reader) and (planner is None or type(planner) is DefaultLoadPlanner)
        return optimizer_key, ranges, f"{type(reader).__name__} and {type(planner).__name__}"

    answers = agreement.gather("looking at the arguments", check)
    for rank, (key, ranges, how) in enumerate(answers):
        if (key, ranges) != answers[0][:2]:
            raise SpecError(
                f"ranks of the process group disagree: rank 0 asks for {answers[0][0]!r} by {answers[0][2]}, "
                f"rank {rank} for {key!r} by {how}; give all ranks the same"
            )
    return answers[0][1]


def _load_ranges(
    model: Mapping[str, Any],
    optimizer_key: str,
    reader: StorageReader,
    *,
    group: dist.ProcessGroup,
    agreement: Agreement,
) -> dict[str, Any]:
    storage = agreement.all_or_raise("opening the checkpoint", lambda: _storage_of(reader))
    try:
        catalog = agreement.from_rank0("reading the metadata", lambda: read_catalog(storage), same=CheckpointNotFound)
        storage.expect(catalog.file_versions)
        plan = agreement.all_or_raise("planning", lambda: plan_result(catalog, optimizer_key, model, group))
        values = agreement.all_or_raise("loading", lambda: _read(catalog, storage, plan, device_of(group), agreement))
    finally:
        storage.close()
    return plan.nested(values)


def _storage_of(reader: StorageReader) -> RangeReader:
    """The storage behind one of torch's own readers."""
    assert isinstance(reader, FileSystemReader)
    if _is_fsspec(reader):
        filesystem: Any = reader.fs  # wraps fsspec's own file system, which has the caller's options
        return RetryingReader(FsspecRangeReader(filesystem.fs, os.fspath(reader.path)))
    return open_storage(os.fspath(reader.path))


def _read(
    catalog: Catalog, storage: RangeReader, plan: ResultPlan, device: torch.device, agreement: Agreement
) -> dict[str, Any]:
    """All values by key. Tensors are read straight into one arena on the device."""
    wanted = [(target.key, layout) for target in plan.targets for layout in target.layouts]
    load_plan = plan_tensors(catalog, wanted, world_rank=agreement.rank, world_size=agreement.size)
    arena, counters = allocate_arena(load_plan.arena_bytes, device), Counters()
    read_plan(load_plan, catalog, storage, arena, options=ReadOptions(), counters=counters)
    local = iter([arena.tensor(t.arena_offset, t.layout.local_shape, t.dtype) for t in load_plan.tensors])
    values = {target.key: target.result([next(local) for _ in target.layouts]) for target in plan.targets}
    objects = [key for key in plan.paths if key in catalog.objects]
    return values | read_objects(objects, catalog, storage, ReadOptions(), counters)
