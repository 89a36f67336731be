"""Turn a saved tensor and the model's own tensors into how the tensor will stand in the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as ShardTensorProperties
from torch.distributed.tensor import DTensor

from shardferry.catalog import KeyPath
from shardferry.dcp.helpers import create_colwise_spec, inner, is_nested_tensor, only_shard
from shardferry.layout import AxisCut, TensorLayout, replicated, sharded, single_box
from shardferry.layout import Shard as ShardPlacement
from shardferry.live import layout_of_tensor
from shardferry.optimizer_index import SCALAR_STATE
from shardferry.region import Region


@dataclass(frozen=True)
class Target:
    """How one saved tensor will stand in the result."""

    key: str
    dtype: torch.dtype
    layouts: tuple[TensorLayout, ...]  # of the local tensors
    build: Callable[[list[torch.Tensor]], Any]  # the result, from its local tensors
    read_offset: tuple[int, ...] | None = None  # of a nested shard: where the result begins in the saved tensor


def target_of(
    key: str,
    path: KeyPath,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    model: Mapping[str, Any],
    group: dist.ProcessGroup,
) -> Target:
    fqn, name = _fqn_and_name(path)
    like = model.get(fqn)
    if name in SCALAR_STATE or not shape or (like is not None and tuple(like.size()) != shape):
        return Target(key, dtype, (replicated(shape),), lambda local: local[0])
    if isinstance(like, ShardedTensor):
        return _like_sharded_tensor(key, dtype, like)
    if isinstance(like, DTensor):
        layout = layout_of_tensor(like, name=fqn)
        return Target(key, dtype, (layout,), lambda local: _dtensor_like(like, local[0]))
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


def _like_sharded_tensor(key: str, dtype: torch.dtype, like: ShardedTensor) -> Target:
    offset: tuple[int, ...] | None = None
    shape = tuple(like.size())
    if is_nested_tensor(like):
        outer = only_shard(like, key)
        like, offset = inner(outer), tuple(outer.metadata.shard_offsets)
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
    return Target(key, dtype, layouts, lambda local: _sharded_tensor_like(tensor, dtype, local), offset)


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


def _chunked(key: str, shape: tuple[int, ...], dtype: torch.dtype, group: dist.ProcessGroup) -> Target:
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

    return Target(key, dtype, layouts, build)
