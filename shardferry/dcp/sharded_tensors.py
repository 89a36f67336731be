"""Make and describe ShardedTensors and process groups: torch's helpers, and ShardedTensors without a collective.

Only this file calls ShardedTensor's private constructor; tests/core/test_private_apis.py fails when torch changes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed.checkpoint.metadata import TensorProperties as SavedProperties
from torch.distributed.tensor import DTensor

from shardferry.errors import LayoutError, SpecError
from shardferry.region import Region, uncovered

STATE_DICT_2D_LAYOUT = dict[str, tuple[Sequence[int] | None, Sequence[int]]]

_NO_RANK = "cpu"  # the placement of shards that nobody reads: a device without a rank


def group_of_call(process_group: Any) -> dist.ProcessGroup:
    """The given process group; None: the whole job.

    Raises:
        SpecError: the argument is not a process group, this rank is not in it, or torch.distributed is not initialised.
    """
    if process_group is None:
        process_group = dist.group.WORLD if dist.is_initialized() else None
        if process_group is None:
            raise SpecError(
                "torch.distributed is not initialised, and sharded tensors need a process group; "
                "call torch.distributed.init_process_group first (a group of one process will do)"
            )
    if process_group is dist.GroupMember.NON_GROUP_MEMBER:
        raise SpecError(
            f"process_group: rank {dist.get_rank()} of the job is not in it; call on the ranks that the group was made of"
        )
    if not isinstance(process_group, dist.ProcessGroup):
        raise SpecError(f"process_group: is a {type(process_group).__name__}, not a ProcessGroup")
    return process_group


def device_type_of(group: dist.ProcessGroup) -> str:
    """The device type of a group's tensors: ``cuda`` if the group has NCCL, even beside a backend for host memory."""
    return "cuda" if "nccl" in dist.get_backend(group) and torch.cuda.is_available() else "cpu"


def device_of(group: dist.ProcessGroup) -> torch.device:
    """This rank's device for a group's tensors."""
    return _current_device(device_type_of(group))


def rank_device(global_rank: int, device_type: str = "cuda") -> str:
    """The device of a rank: ``cuda:1`` for rank 5 where each host has 4; ``cpu`` if this host has no such device."""
    if device_type == "cpu":
        return "cpu"
    module = torch.get_device_module(device_type)
    if not module.is_available():
        return "cpu"
    return f"{device_type}:{global_rank % module.device_count()}"


def create_colwise_spec(pg: dist.ProcessGroup | None = None) -> ChunkShardingSpec:
    """A spec that shards dimension 0 over a process group (default: the whole job). Placements have *global* ranks.

    Raises:
        SpecError: see `group_of_call`.
    """
    group = group_of_call(pg)
    device_type = device_type_of(group)
    ranks = dist.get_process_group_ranks(group)
    return ChunkShardingSpec(dim=0, placements=[f"rank:{rank}/{rank_device(rank, device_type)}" for rank in ranks])


def is_nested_tensor(val: torch.Tensor) -> bool:
    """Whether a ShardedTensor's local shard is a ShardedTensor itself (FSDP1 over TP).

    Raises:
        LayoutError: another nesting, which no wrapper makes.
    """
    if isinstance(val, ShardedTensor):
        tensors = [shard.tensor for shard in val.local_shards()]
        if any(isinstance(tensor, DTensor) for tensor in tensors):
            raise LayoutError("Cannot handle DTensor nested inside ShardedTensor")
        return any(isinstance(tensor, ShardedTensor) for tensor in tensors)
    if isinstance(val, DTensor) and isinstance(val._local_tensor, DTensor | ShardedTensor):
        raise LayoutError("Cannot handle nested DTensor")
    return False


def alloc_tensor(props: SavedProperties, size: Sequence[int], device_type: str = "cuda") -> torch.Tensor:
    """An uninitialised tensor on the current device of a type."""
    return torch.empty(
        tuple(size),
        dtype=props.dtype,
        layout=props.layout,
        requires_grad=props.requires_grad,
        pin_memory=props.pin_memory,
        device=_current_device(device_type),
    )


def _current_device(device_type: str) -> torch.device:
    if device_type == "cpu":
        return torch.device("cpu")
    return torch.device(device_type, torch.get_device_module(device_type).current_device())


def get_state_dict_2d_layout(
    state_dict: Mapping[str, Any],
) -> tuple[STATE_DICT_2D_LAYOUT, dist.ProcessGroup | None]:
    """The slice of each tensor that this rank's tensor-parallel shard is, and the data-parallel group of its shards.

    Returns:
        By key: offsets (None if the value is not nested) and sizes, in elements; and the inner shards' process group.

    Raises:
        LayoutError: a nested tensor has several local shards, or its nesting is not supported.
    """
    layout: STATE_DICT_2D_LAYOUT = {}
    group: dist.ProcessGroup | None = None
    for key, value in state_dict.items():
        if not isinstance(value, torch.Tensor):
            continue  # a module's extra state
        layout[key] = (None, size_of(value))
        if isinstance(value, ShardedTensor) and is_nested_tensor(value):
            outer, inner = nested_shard(value, key)
            layout[key] = (outer.shard_offsets, outer.shard_sizes)
            group = inner._process_group
    return layout, group


def nested_shard(tensor: ShardedTensor, key: str) -> tuple[ShardMetadata, ShardedTensor]:
    """The only local shard of a nested tensor: its metadata, and the ShardedTensor that it is.

    Raises:
        LayoutError: there are several.
    """
    shards = tensor.local_shards()
    if len(shards) != 1:
        raise LayoutError(f"{key}: a nested ShardedTensor with {len(shards)} local shards; one is supported")
    inner: Any = shards[0].tensor
    assert isinstance(inner, ShardedTensor)
    return shards[0].metadata, inner


def sharded_tensor(
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    table: Sequence[ShardMetadata],
    own: Sequence[ShardMetadata],
    local: Sequence[torch.Tensor],
    group: dist.ProcessGroup,
) -> ShardedTensor:
    """A ShardedTensor of this rank's local tensors, made without a collective.

    Args:
        table: the shards of all ranks.
        own: this rank's shards, as they stand in the table.
        local: the tensors of ``own``. The result has their devices, whatever the table says.
    """
    placed = [_metadata(region_of(shard), tensor) for shard, tensor in zip(own, local, strict=True)]
    by_region = {region_of(shard): shard for shard in placed}
    metadata = ShardedTensorMetadata(
        shards_metadata=[by_region[region_of(shard)] if is_own(shard) else shard for shard in table],
        size=torch.Size(shape),
        tensor_properties=TensorProperties(dtype=dtype),
    )
    shards = [Shard(tensor, shard) for tensor, shard in zip(local, placed, strict=True)]
    return ShardedTensor._init_from_local_shards_and_global_metadata(shards, metadata, process_group=group)


def boxes_as_sharded_tensor(
    shape: Sequence[int],
    dtype: torch.dtype,
    boxes: Sequence[tuple[Region, torch.Tensor]],
    *,
    group: dist.ProcessGroup,
) -> ShardedTensor:
    """This rank's boxes of a saved tensor as local shards, for any planner to fill. Shards of other ranks have no owner.

    Args:
        shape: of the saved tensor; not without elements.
        boxes: none of them empty, in elements of the saved tensor, each with its local tensor.
    """
    own = [_metadata(region, tensor) for region, tensor in boxes]
    rest = uncovered(Region.whole(shape), (region for region, _ in boxes))
    table = own + [ShardMetadata(list(region.offsets), list(region.sizes), _NO_RANK) for region in rest]
    return sharded_tensor(shape, dtype, table=table, own=own, local=[tensor for _, tensor in boxes], group=group)


def size_of(tensor: torch.Tensor) -> torch.Size:
    """The global size of a tensor of any kind. ShardedTensor's own ``size`` warns at each call that it is deprecated."""
    return torch.Size(tensor.metadata().size) if isinstance(tensor, ShardedTensor) else tensor.size()


def is_own(shard: ShardMetadata) -> bool:
    """Whether a shard belongs to this rank."""
    return isinstance(shard.placement, torch.distributed._remote_device) and shard.placement.rank() == dist.get_rank()


def region_of(shard: ShardMetadata, origin: Sequence[int] | None = None) -> Region:
    """The box of a shard, in elements of its own tensor, or of an outer tensor in which that begins at ``origin``."""
    offsets = tuple(shard.shard_offsets)
    if origin is not None:
        offsets = tuple(a + b for a, b in zip(offsets, origin, strict=True))
    return Region(offsets, tuple(shard.shard_sizes))


def _metadata(region: Region, tensor: torch.Tensor) -> ShardMetadata:
    return ShardMetadata(list(region.offsets), list(region.sizes), f"rank:{dist.get_rank()}/{tensor.device}")
