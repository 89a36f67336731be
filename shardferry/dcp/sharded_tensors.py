"""Make ShardedTensors of local tensors and of what is known of the other ranks' shards, without a collective.

The only place that calls ShardedTensor's private constructor; tests/core/test_private_apis.py fails when torch changes it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties

from shardferry.region import Region, uncovered

_ELSEWHERE = "cpu"  # a placement without a rank: of shards that nobody is asked for


def sharded_tensor(
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    table: Sequence[ShardMetadata],
    own: Sequence[ShardMetadata],
    local: Sequence[torch.Tensor],
    group: dist.ProcessGroup,
) -> ShardedTensor:
    """A ShardedTensor of this rank's local tensors.

    Args:
        table: the shards of all ranks.
        own: this rank's, as they stand in the table.
        local: their tensors. The result says that they are on the device where they are, whatever the table says.
    """
    placed = [_metadata(region_of(shard), tensor) for shard, tensor in zip(own, local, strict=True)]
    by_box = {region_of(shard): shard for shard in placed}
    metadata = ShardedTensorMetadata(
        shards_metadata=[by_box[region_of(shard)] if is_here(shard) else shard for shard in table],
        size=torch.Size(shape),
        tensor_properties=TensorProperties(dtype=dtype),
    )
    shards = [Shard(tensor, shard) for tensor, shard in zip(local, placed, strict=True)]
    return ShardedTensor._init_from_local_shards_and_global_metadata(shards, metadata, process_group=group)


def boxes_as_sharded_tensor(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    regions: Sequence[Region],
    local: Sequence[torch.Tensor],
    group: dist.ProcessGroup,
) -> ShardedTensor:
    """Boxes of a whole tensor that this rank holds, for a planner to fill; the rest of the tensor is nobody's.

    The local shards stand at their places in the *saved* tensor, so that any planner finds what to read. Only they may be
    looked at. The shape must hold elements.
    """
    filled = [(region, tensor) for region, tensor in zip(regions, local, strict=True) if region.numel]
    own = [_metadata(region, tensor) for region, tensor in filled]
    rest = [
        ShardMetadata(list(region.offsets), list(region.sizes), _ELSEWHERE)
        for region in uncovered(Region.whole(shape), (region for region, _ in filled))
    ]
    tensors = [tensor for _, tensor in filled]
    return sharded_tensor(shape, dtype, table=[*own, *rest], own=own, local=tensors, group=group)


def size_of(tensor: torch.Tensor) -> torch.Size:
    """The size of a tensor of any kind. A ShardedTensor's own method remarks each time that the class is deprecated."""
    return torch.Size(tensor.metadata().size) if isinstance(tensor, ShardedTensor) else tensor.size()


def is_here(shard: ShardMetadata) -> bool:
    """Whether a shard is this rank's."""
    return isinstance(shard.placement, torch.distributed._remote_device) and shard.placement.rank() == dist.get_rank()


def region_of(shard: ShardMetadata, origin: Sequence[int] | None = None) -> Region:
    """The box of a shard, counted from its own tensor's origin, or from that of a tensor in which its own begins at ``origin``."""
    offsets = tuple(shard.shard_offsets)
    if origin is not None:
        offsets = tuple(a + b for a, b in zip(offsets, origin, strict=True))
    return Region(offsets, tuple(shard.shard_sizes))


def _metadata(region: Region, tensor: torch.Tensor) -> ShardMetadata:
    return ShardMetadata(list(region.offsets), list(region.sizes), f"rank:{dist.get_rank()}/{tensor.device}")
