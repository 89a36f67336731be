"""Load an optimizer's state through `dcp.load`, with somebody's own reader or planner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import StorageReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlanner

from shardferry.dcp.cover import check_cover
from shardferry.dcp.groups import device_of
from shardferry.dcp.key_paths import nest_optimizer, optimizer_paths
from shardferry.dcp.reader_with_offset import ReaderWithOffset
from shardferry.dcp.targets import SavedState, Target, targets_of
from shardferry.errors import CatalogError, CheckpointNotFound, PlanError, RankError, ShardferryError
from shardferry.exchange.agreement import Agreement
from shardferry.state_dicts import KeyPath

_OBJECT = "<bytes_io>"  # stands where a planner puts a Python object


def load_by_reader(
    model: Mapping[str, Any],
    optimizer_key: str,
    reader: StorageReader,
    planner: LoadPlanner | None,
    group: dist.ProcessGroup,
    agreement: Agreement,
) -> dict[str, Any]:
    """See `shardferry.dcp.load_sharded_optimizer_state_dict`; all ranks of the agreement must call it."""

    def prepare() -> tuple[dict[str, KeyPath], list[Target], _Tensors]:
        metadata = _metadata_of(reader)
        paths, targets = _targets(metadata, optimizer_key, model, group, location=_location(reader))
        local: _Tensors = {target.key: _allocate(target, device_of(group)) for target in targets}
        return paths, targets, local

    paths, targets, local = agreement.attempt("planning", prepare)
    for_planner = agreement.attempt("planning", lambda: {t.key: t.for_planner(local[t.key]) for t in targets})
    state_dict: dict[str, Any] = {key: for_planner.get(key, _OBJECT) for key in paths}
    planner = planner or ReaderWithOffset({})
    _load(state_dict, reader, planner, group)
    results = {target.key: target.result for target in targets}
    values: dict[str, Any] = {}
    for key, value in state_dict.items():
        if value is _OBJECT:
            values[key] = _object_of(planner, key)
        elif key in results and value is for_planner[key]:
            values[key] = results[key](local[key])
        else:  # a planner may have put something else in a tensor's place
            values[key] = value
    return nest_optimizer(paths, values, optimizer_key)


def _object_of(planner: LoadPlanner, key: str) -> Any:
    """A Python object that isn't where it was asked for: torch's planner, when it doesn't flatten, keeps it in a copy."""
    value = getattr(planner, "state_dict", {}).get(key, _OBJECT)
    if value is _OBJECT:
        raise PlanError(
            f"{key}: {type(planner).__name__} left out this Python object; its load_bytes must put it into the state dict"
        )
    return value


_Tensors = dict[str, list[torch.Tensor]]


def _metadata_of(reader: StorageReader) -> Metadata:
    try:
        metadata = reader.read_metadata()
    except OSError as error:
        raise CheckpointNotFound(
            f"{_location(reader)}: {type(reader).__name__} can't read the metadata ({error}). Give the place of a completed "
            "checkpoint; one that was saved without collectives is read by torch's own FileSystemReader without a planner"
        ) from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        raise CatalogError(
            f"{_location(reader)}: {type(reader).__name__}.read_metadata gave a {type(metadata).__name__}, not a Metadata"
        )
    return metadata


def _location(reader: StorageReader) -> str:
    return str(getattr(reader, "checkpoint_id", None) or getattr(reader, "path", None) or type(reader).__name__)


def _targets(
    metadata: Metadata, optimizer_key: str, model: Mapping[str, Any], group: dist.ProcessGroup, *, location: str
) -> tuple[dict[str, KeyPath], list[Target]]:
    saved = metadata.state_dict_metadata
    paths = optimizer_paths(saved, metadata.planner_data, optimizer_key, location=location)
    tensors = {key: value for key in paths if isinstance(value := saved[key], TensorStorageMetadata)}
    states = [SavedState(key, paths[key], tuple(value.size), value.properties.dtype) for key, value in tensors.items()]
    targets = targets_of(states, model, group)
    for target in targets:
        for box in (box for layout in target.layouts for box in layout.boxes):
            check_cover(target.key, tensors[target.key], box.region)
    return paths, targets


def _allocate(target: Target, device: torch.device) -> list[torch.Tensor]:
    """Only what this rank will hold."""
    return [torch.empty(layout.local_shape, dtype=target.dtype, device=device) for layout in target.layouts]


def _load(state_dict: dict[str, Any], reader: StorageReader, planner: LoadPlanner, group: dist.ProcessGroup) -> None:
    try:
        dcp.load(state_dict, storage_reader=reader, planner=planner, process_group=group)
    except CheckpointException as error:
        raise _error_of(error, dist.get_rank(group)) from error


def _error_of(failed: CheckpointException, own_rank: int) -> Exception:
    """Torch's error of all ranks as ours: this rank's own, or one that names the ranks that failed."""
    causes = {rank: cause for rank, (cause, _) in failed.failures.items()}
    own = causes.get(own_rank)
    if isinstance(own, ShardferryError):
        return own
    words: dict[str, list[int]] = {}
    for rank, cause in causes.items():
        words.setdefault(f"{type(cause).__name__}: {cause}", []).append(rank)
    parts = [f"rank {', '.join(map(str, sorted(ranks)))}: {message}" for message, ranks in words.items()]
    return RankError(f"loading failed on {'; '.join(parts)}", sorted(causes))
