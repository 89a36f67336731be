"""ShardedTensors as FSDP1, FSDP1 over TP, and nobody in particular make them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed.tensor.parallel.fsdp import _chunk_tensor

from shardferry.region import Region

Box = tuple[Sequence[int], Sequence[int]]  # offsets and sizes


def sharded(shape: Sequence[int], boxes: dict[int, Sequence[Box]], dtype: torch.dtype = torch.float32) -> ShardedTensor:
    """A ShardedTensor over the world: the boxes of each rank, which make up the whole; zeros."""
    table = [
        ShardMetadata(list(offsets), list(sizes), f"rank:{rank}/cpu")
        for rank, owned in boxes.items()
        for offsets, sizes in owned
    ]
    return _of_table(shape, table, dtype, group=None)


def mostly_elsewhere(shape: Sequence[int], own: Box, rest: Sequence[Box]) -> ShardedTensor:
    """A ShardedTensor of which this rank holds one box; where the rest is, is not said."""
    table = [ShardMetadata(list(own[0]), list(own[1]), f"rank:{dist.get_rank()}/cpu")]
    table += [ShardMetadata(list(offsets), list(sizes), "cpu") for offsets, sizes in rest]
    return _of_table(shape, table, torch.float32, group=None)


def chunked(shape: Sequence[int], group: Any, dim: int = 0, *, keep_empty: bool = False) -> ShardedTensor:
    """Cut along one dimension over a group, by torch's own spec; zeros.

    Args:
        keep_empty: ranks beyond the rows have an empty shard; else they have none.
    """
    ranks = dist.get_process_group_ranks(group)
    spec = ChunkShardingSpec(dim=dim, placements=[f"rank:{rank}/cpu" for rank in ranks])
    table = spec.build_metadata(torch.Size(shape), TensorProperties(dtype=torch.float32)).shards_metadata
    table = [shard for shard in table if keep_empty or 0 not in shard.shard_sizes]
    return _of_table(shape, table, torch.float32, group)


def nested(shape: Sequence[int], *, dim: int, tp: int, tp_inside: bool = True) -> ShardedTensor:
    """What FSDP1 gives over TP: a slice along ``dim`` a TP rank, cut again by rows over its own data-parallel group.

    The second cut is torch's own code.

    Args:
        tp_inside: TP ranks are neighbours, as they are on a node: of 4 ranks with ``tp=2``, data-parallel groups are 0, 2
            and 1, 3. Otherwise these are neighbours: 0, 1 and 2, 3.
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    inside = tp if tp_inside else world_size // tp
    neighbours = [list(range(start, start + inside)) for start in range(0, world_size, inside)]
    apart = [list(range(start, world_size, inside)) for start in range(inside)]
    tp_group = _group_of(rank, neighbours if tp_inside else apart)
    dp_group = _group_of(rank, apart if tp_inside else neighbours)
    outer = chunked(shape, tp_group, dim, keep_empty=True)
    return _chunk_tensor(outer, dist.get_rank(dp_group), dist.get_world_size(dp_group), 1, dp_group)


def _group_of(rank: int, all_ranks: Sequence[list[int]]) -> Any:
    """Make all groups, as all ranks must; give this rank's."""
    groups = [dist.new_group(ranks) for ranks in all_ranks]
    return next(group for group, ranks in zip(groups, all_ranks, strict=True) if rank in ranks)


def place_of_nested(tensor: ShardedTensor) -> list[Region]:
    """Where the innermost local tensors lie in the whole."""
    (outer,) = tensor.local_shards()
    start = outer.metadata.shard_offsets
    shards = [shard.metadata for shard in outer.tensor.local_shards()]
    return [
        Region(tuple(a + b for a, b in zip(start, m.shard_offsets, strict=True)), tuple(m.shard_sizes)) for m in shards
    ]


def cut(full: torch.Tensor, region: Region) -> torch.Tensor:
    """A box of a whole tensor."""
    return full[tuple(slice(start, end) for start, end in zip(region.offsets, region.ends, strict=True))]


def _of_table(shape: Sequence[int], table: Sequence[ShardMetadata], dtype: torch.dtype, group: Any) -> ShardedTensor:
    own = [shard for shard in table if shard.placement.rank() == dist.get_rank()]
    shards = [Shard(torch.zeros(tuple(shard.shard_sizes), dtype=dtype), shard) for shard in own]
    metadata = ShardedTensorMetadata(list(table), torch.Size(shape), TensorProperties(dtype=dtype))
    return ShardedTensor._init_from_local_shards_and_global_metadata(shards, metadata, process_group=group)
