"""The face for users of ``torch.distributed.checkpoint.optimizer``: change the import, keep the call.

Same names, same types in and out; right where torch's are wrong: state lies as its parameter's ShardedTensor or DTensor
does (torch shards over the whole world, which corrupts HSDP), no whole tensor is allocated, only needed bytes are read,
holes and wrong keys are errors, and a rank that fails makes all ranks raise. Each helper also has torch's own name.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as ShardTensorProperties
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, StorageReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import _create_read_items, create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor

from shardferry.agreement import Agreement
from shardferry.arena import allocate_arena
from shardferry.catalog import Catalog, KeyPath
from shardferry.checkpoint import open_checkpoint
from shardferry.errors import LayoutError, PlanError
from shardferry.layout import AxisCut, TensorLayout, replicated, sharded, single_box
from shardferry.layout import Shard as ShardPlacement
from shardferry.nesting import nest
from shardferry.optimizer_index import SCALAR_STATE, index_optimizer
from shardferry.plan import plan_tensors
from shardferry.reader import Counters, ReadOptions, read_object, read_plan
from shardferry.region import Region
from shardferry.storage.base import open_storage
from shardferry.tensor_layout import layout_of_tensor

STATE_DICT_2D_LAYOUT = dict[str, tuple[Sequence[int] | None, Sequence[int]]]
_OBJECT = "<bytes_io>"  # stands where a planner puts a Python object


# --- torch's helpers -------------------------------------------------------------------------------------------------


def rank_device(global_rank: int, device_type: str = "cuda") -> str:
    """The device of a rank, as in ``rank:3/cuda:1``; ``cpu`` where the type has no device here."""
    if device_type == "cpu":
        return "cpu"
    module = torch.get_device_module(device_type)
    if not module.is_available():
        return "cpu"
    return f"{device_type}:{global_rank % module.device_count()}"


def create_colwise_spec(pg: dist.ProcessGroup | None = None) -> ChunkShardingSpec:
    """Chunks of dimension 0 over a process group (default: the world), placed by *global* ranks."""
    group = pg or _world()
    device_type = _device_type(group)
    ranks = dist.get_process_group_ranks(group)
    return ChunkShardingSpec(dim=0, placements=[f"rank:{rank}/{rank_device(rank, device_type)}" for rank in ranks])


def is_nested_tensor(val: torch.Tensor) -> bool:
    """Whether a ShardedTensor's local shard is itself a ShardedTensor (FSDP1 over TP).

    Raises:
        ValueError: another nesting, which nobody writes.
    """
    if isinstance(val, ShardedTensor):
        inner = [shard.tensor for shard in val.local_shards()]
        if any(isinstance(tensor, DTensor) for tensor in inner):
            raise ValueError("Cannot handle DTensor nested inside ShardedTensor")
        return any(isinstance(tensor, ShardedTensor) for tensor in inner)
    if isinstance(val, DTensor) and isinstance(val._local_tensor, DTensor | ShardedTensor):
        raise ValueError("Cannot handle nested DTensor")  # noqa: TRY004 - as torch does
    return False


def alloc_tensor(props: TensorProperties, size: Sequence[int], device_type: str = "cuda") -> torch.Tensor:
    """Uninitialised memory on the current device of a type."""
    device = torch.device(device_type)
    if device_type != "cpu":
        device = torch.device(device_type, torch.get_device_module(device_type).current_device())
    return torch.empty(
        tuple(size),
        dtype=props.dtype,
        layout=props.layout,
        requires_grad=props.requires_grad,
        pin_memory=props.pin_memory,
        device=device,
    )


def get_state_dict_2d_layout(
    state_dict: Mapping[str, Any],
) -> tuple[STATE_DICT_2D_LAYOUT, dist.ProcessGroup | None]:
    """Which slice of each tensor this rank's tensor-parallel shard is, and the data-parallel group inside it.

    Returns:
        By key: offsets (None where the value isn't nested) and sizes; and the process group of the inner shards.
    """
    layout: STATE_DICT_2D_LAYOUT = {}
    group: dist.ProcessGroup | None = None
    for key, value in state_dict.items():
        layout[key] = (None, value.size())
        if is_nested_tensor(value):
            shard = _only_shard(value, key)
            layout[key] = (shard.metadata.shard_offsets, shard.metadata.shard_sizes)
            group = _inner(shard)._process_group
    return layout, group


class ReaderWithOffset(DefaultLoadPlanner):
    """A load planner that reads each ShardedTensor from an offset inside the saved tensor.

    Args:
        fqn_to_offset: by key, elements; keys that are missing have none.
    """

    def __init__(self, fqn_to_offset: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self.fqn_to_offset = dict(fqn_to_offset)
        self.metadata = Metadata({})
        self.state_dict: dict[str, Any] = {}
        self.translation: dict[MetadataIndex, MetadataIndex] = {}

    def create_local_plan(self) -> LoadPlan:
        """Plan this rank's reads.

        Raises:
            PlanError: a key isn't saved, or a shard with its offset lies outside the saved tensor.
        """
        self.translation = {}
        requests: list[ReadItem] = []
        assert self.metadata is not None
        for key, value in self.state_dict.items():
            saved = self.metadata.state_dict_metadata.get(key)
            if saved is None:
                raise PlanError(
                    f"{key}: is not in the checkpoint, which has {len(self.metadata.state_dict_metadata)} keys"
                )
            offset = self.fqn_to_offset.get(key)
            if offset is None or not isinstance(value, ShardedTensor):
                requests += _create_read_items(key, saved, value)
            else:
                requests += self._shifted(key, saved, value, offset)
        return LoadPlan(requests)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """The local tensor that a read goes to."""
        return super().lookup_tensor(self.translation.get(index, index))

    def _shifted(self, key: str, saved: Any, value: ShardedTensor, offset: Sequence[int]) -> list[ReadItem]:
        if not isinstance(saved, TensorStorageMetadata):
            raise PlanError(f"{key}: is wanted as a tensor, but was saved as a Python object")
        chunks = []
        for shard in value.local_shards():
            start = tuple(a + b for a, b in zip(shard.metadata.shard_offsets, offset, strict=True))
            sizes = tuple(shard.metadata.shard_sizes)
            if any(o + s > n for o, s, n in zip(start, sizes, saved.size, strict=True)):
                raise PlanError(f"{key}: {Region(start, sizes)} lies outside the saved shape {tuple(saved.size)}")
            chunks.append(ChunkStorageMetadata(offsets=torch.Size(start), sizes=torch.Size(sizes)))
        requests = create_read_items_for_chunk_list(key, saved, chunks)
        for request in requests:
            assert request.dest_index.offset is not None
            local = tuple(a - b for a, b in zip(request.dest_index.offset, offset, strict=True))
            self.translation[request.dest_index] = dataclasses.replace(request.dest_index, offset=torch.Size(local))
        return requests


# --- the load --------------------------------------------------------------------------------------------------------


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
    group = process_group or _world()
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


@dataclass(frozen=True)
class _Target:
    """How one saved tensor will stand in the result."""

    key: str
    dtype: torch.dtype
    layouts: tuple[TensorLayout, ...]  # of the local tensors
    build: Callable[[list[torch.Tensor]], Any]  # the result, from its local tensors
    read_offset: tuple[int, ...] | None = None  # of a nested shard: where the result begins in the saved tensor


def _load_ranged(
    model: Mapping[str, Any], optimizer_key: str, directory: str, group: dist.ProcessGroup, agreement: Agreement
) -> dict[str, Any]:
    def prepare() -> tuple[Catalog, dict[str, KeyPath], list[_Target]]:
        catalog = open_checkpoint(directory)
        paths = {
            key: _path_of(catalog, optimizer_key, key) for key in index_optimizer(catalog, optimizer_key).all_keys()
        }
        saved = {key: catalog.tensors[key] for key in paths if key in catalog.tensors}
        targets = [_target(key, paths[key], t.shape, t.dtype, model, group) for key, t in saved.items()]
        return catalog, paths, targets

    catalog, paths, targets = agreement.attempt("planning", prepare)
    wanted = [(target.key, layout) for target in targets for layout in target.layouts]

    def read() -> dict[str, Any]:
        plan = plan_tensors(catalog, wanted, world_rank=agreement.rank, world_size=agreement.size)
        arena = allocate_arena(plan.arena_bytes, _device(group))
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
    def prepare() -> tuple[dict[str, KeyPath], list[_Target], dict[str, Any]]:
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
            target = _target(key, paths[key], shape, dtype, model, group)
            empty = [torch.empty(layout.local_shape, dtype=dtype, device=_device(group)) for layout in target.layouts]
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


def _target(
    key: str,
    path: KeyPath,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    model: Mapping[str, Any],
    group: dist.ProcessGroup,
) -> _Target:
    fqn, name = _fqn_and_name(path)
    like = model.get(fqn)
    if name in SCALAR_STATE or not shape or (like is not None and tuple(like.size()) != shape):
        return _Target(key, dtype, (replicated(shape),), lambda local: local[0])
    if isinstance(like, ShardedTensor):
        return _like_sharded_tensor(key, dtype, like)
    if isinstance(like, DTensor):
        layout = layout_of_tensor(like, name=fqn)
        return _Target(key, dtype, (layout,), lambda local: _dtensor_like(like, local[0]))
    return _chunked(key, shape, dtype, group)


def _fqn_and_name(path: KeyPath) -> tuple[str, str]:
    """Of ``("optim", "state", fqn, name)``, or ``("optim", "state.<fqn>.<name>")``."""
    if len(path) >= 4:
        return str(path[2]), str(path[3])
    fqn, _, name = str(path[-1]).removeprefix("state.").rpartition(".")
    return fqn, name


def _dtensor_like(like: DTensor, local: torch.Tensor) -> DTensor:
    return DTensor.from_local(
        local.view(like._local_tensor.shape),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def _like_sharded_tensor(key: str, dtype: torch.dtype, like: ShardedTensor) -> _Target:
    offset: tuple[int, ...] | None = None
    shape = tuple(like.size())
    if is_nested_tensor(like):
        outer = _only_shard(like, key)
        like, offset = _inner(outer), tuple(outer.metadata.shard_offsets)
    origin = offset or (0,) * len(shape)
    layouts = tuple(
        single_box(
            shape,
            Region(
                tuple(a + b for a, b in zip(shard.metadata.shard_offsets, origin, strict=True)),
                tuple(shard.metadata.shard_sizes),
            ),
        )
        for shard in like.local_shards()
    )
    tensor = like
    return _Target(key, dtype, layouts, lambda local: _sharded_tensor_like(tensor, dtype, local), offset)


def _sharded_tensor_like(like: ShardedTensor, dtype: torch.dtype, local: list[torch.Tensor]) -> ShardedTensor:
    metadata = ShardedTensorMetadata(
        shards_metadata=list(like.metadata().shards_metadata),
        size=like.size(),
        tensor_properties=ShardTensorProperties(dtype=dtype),
    )
    shards = [Shard(tensor, shard.metadata) for tensor, shard in zip(local, like.local_shards(), strict=True)]
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        shards, metadata, process_group=like._process_group
    )


def _chunked(key: str, shape: tuple[int, ...], dtype: torch.dtype, group: dist.ProcessGroup) -> _Target:
    """Cut along dimension 0 over the group, as torch does for parameters that it doesn't know."""
    layout = sharded(shape, [AxisCut(dist.get_world_size(group), dist.get_rank(group), ShardPlacement(0))])
    spec = create_colwise_spec(group)
    metadata = spec.build_metadata(torch.Size(shape), ShardTensorProperties(dtype=dtype))
    # Ranks beyond the rows hold nothing, and the table of shards doesn't mention them.
    metadata.shards_metadata = [shard for shard in metadata.shards_metadata if 0 not in shard.shard_sizes]
    layouts = (layout,) if layout.local_numel else ()

    def build(local: list[torch.Tensor]) -> ShardedTensor:
        region = layout.boxes[0].region if layout.boxes else None
        own = [m for m in metadata.shards_metadata if region and tuple(m.shard_offsets) == region.offsets]
        shards = [Shard(tensor, shard) for tensor, shard in zip(local, own, strict=True)]
        return ShardedTensor._init_from_local_shards_and_global_metadata(shards, metadata, process_group=group)

    return _Target(key, dtype, layouts, build)


def _only_shard(tensor: ShardedTensor, key: str) -> Shard:
    shards = tensor.local_shards()
    if len(shards) != 1:
        raise LayoutError(f"{key}: a nested ShardedTensor with {len(shards)} local shards; one is supported")
    return shards[0]


def _inner(shard: Shard) -> ShardedTensor:
    """The ShardedTensor inside a nested one's shard."""
    tensor: Any = shard.tensor
    assert isinstance(tensor, ShardedTensor)
    return tensor


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None, "torch.distributed is not initialised"
    return world


def _device_type(group: dist.ProcessGroup) -> str:
    """Where a group's tensors live: on GPUs where it can send them, also when it can send host memory too."""
    return "cuda" if "nccl" in dist.get_backend(group) and torch.cuda.is_available() else "cpu"


def _device(group: dist.ProcessGroup) -> torch.device:
    if _device_type(group) == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


# torch's own names
_ReaderWithOffset = ReaderWithOffset
_gen_rank_device = rank_device
_create_colwise_spec = create_colwise_spec
_is_nested_tensor = is_nested_tensor
_alloc_tensor = alloc_tensor
_get_state_dict_2d_layout = get_state_dict_2d_layout

__all__ = [
    "STATE_DICT_2D_LAYOUT",
    "ReaderWithOffset",
    "alloc_tensor",
    "create_colwise_spec",
    "get_state_dict_2d_layout",
    "is_nested_tensor",
    "load_sharded_optimizer_state_dict",
    "rank_device",
]
