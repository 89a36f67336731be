"""Torch's helpers: say where a rank's device is, how a group cuts dimension 0, and which tensors are nested."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed.checkpoint.metadata import TensorProperties
from torch.distributed.tensor import DTensor

from shardferry.dcp.groups import device_type_of, group_of_call
from shardferry.dcp.sharded_tensors import size_of
from shardferry.errors import LayoutError

STATE_DICT_2D_LAYOUT = dict[str, tuple[Sequence[int] | None, Sequence[int]]]


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
    group = group_of_call(pg)
    device_type = device_type_of(group)
    ranks = dist.get_process_group_ranks(group)
    return ChunkShardingSpec(dim=0, placements=[f"rank:{rank}/{rank_device(rank, device_type)}" for rank in ranks])


def is_nested_tensor(val: torch.Tensor) -> bool:
    """Whether a ShardedTensor's local shard is itself a ShardedTensor (FSDP1 over TP).

    Raises:
        LayoutError: another nesting, which nobody writes.
    """
    if isinstance(val, ShardedTensor):
        tensors = [shard.tensor for shard in val.local_shards()]
        if any(isinstance(tensor, DTensor) for tensor in tensors):
            raise LayoutError("Cannot handle DTensor nested inside ShardedTensor")
        return any(isinstance(tensor, ShardedTensor) for tensor in tensors)
    if isinstance(val, DTensor) and isinstance(val._local_tensor, DTensor | ShardedTensor):
        raise LayoutError("Cannot handle nested DTensor")
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
        if not isinstance(value, torch.Tensor):
            continue  # a module's extra state
        layout[key] = (None, size_of(value))
        if isinstance(value, ShardedTensor) and is_nested_tensor(value):
            shard = only_shard(value, key)
            layout[key] = (shard.metadata.shard_offsets, shard.metadata.shard_sizes)
            group = inner(shard)._process_group
    return layout, group


def only_shard(tensor: ShardedTensor, key: str) -> Shard:
    """The local shard of a nested tensor. Raises LayoutError where there are several."""
    shards = tensor.local_shards()
    if len(shards) != 1:
        raise LayoutError(f"{key}: a nested ShardedTensor with {len(shards)} local shards; one is supported")
    return shards[0]


def inner(shard: Shard) -> ShardedTensor:
    """The ShardedTensor inside a nested one's shard."""
    tensor: Any = shard.tensor
    assert isinstance(tensor, ShardedTensor)
    return tensor
