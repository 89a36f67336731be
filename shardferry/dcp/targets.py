"""Turn the saved tensors and the model's own ones into how each saved tensor will stand in the result.

State with its parameter's shape lies as the parameter does; all other state is whole on every rank, never cut by guess.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties
from torch.distributed.tensor import DTensor

from shardferry.checkpoint.optimizer_state import SCALAR_STATE
from shardferry.dcp.helpers import create_colwise_spec, inner, is_nested_tensor, only_shard
from shardferry.dcp.key_paths import fqn_and_name
from shardferry.dcp.sharded_tensors import boxes_as_sharded_tensor, is_here, region_of, sharded_tensor, size_of
from shardferry.errors import LayoutError
from shardferry.layout.from_tensor import layout_of_tensor
from shardferry.layout.tensor_layout import TensorLayout, replicated, single_box
from shardferry.region import Region, row_major_strides
from shardferry.state_dicts import KeyPath

# What torch's own optimizers keep in their parameter's shape, always: another shape is another model's.
_AS_PARAMETER = frozenset(
    {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "acc_delta"}
)

Build = Callable[[Sequence[torch.Tensor]], Any]


@dataclass(frozen=True, slots=True)
class SavedState:
    """One tensor of the optimizer, as the checkpoint has it."""

    key: str
    path: KeyPath
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def fqn(self) -> str:
        return fqn_and_name(self.path)[0]

    @property
    def name(self) -> str:
        return fqn_and_name(self.path)[1]


@dataclass(frozen=True)
class Target:
    """How one saved tensor will stand in the result: which local tensors it has, and what is made of them."""

    key: str
    dtype: torch.dtype
    layouts: tuple[TensorLayout, ...]  # of the local tensors
    result: Build
    for_planner: Build  # of the same local tensors: what tells any planner where they lie in the saved tensor


def targets_of(states: Iterable[SavedState], model: Mapping[str, Any], group: dist.ProcessGroup) -> list[Target]:
    """One target a saved tensor.

    Args:
        model: the model's state dict; what isn't a tensor is not looked at.

    Raises:
        LayoutError: a tensor of the model lies in a way that isn't supported.
    """
    states = list(states)
    guessed, factors = _guessed_shapes(states), _factors(states, model)
    return [
        _whole(state) if state.name in factors else _target(state, model.get(state.fqn), guessed.get(state.fqn), group)
        for state in states
    ]


def _factors(states: Iterable[SavedState], model: Mapping[str, Any]) -> set[str]:
    """Names that somewhere have another shape than their parameter: a square matrix's statistics are square by accident."""
    known = [(state, like) for state in states if isinstance(like := model.get(state.fqn), torch.Tensor)]
    return {state.name for state, like in known if state.shape != tuple(size_of(like))} - _AS_PARAMETER


def _guessed_shapes(states: Iterable[SavedState]) -> dict[str, tuple[int, ...] | None]:
    """The shape of each parameter as its state tells it, for parameters that the model's state dict hasn't.

    None where the state's shapes disagree (Adafactor's rows and columns). A number beside tensors tells nothing.
    """
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for state in states:
        if state.name not in SCALAR_STATE:
            shapes.setdefault(state.fqn, set()).add(state.shape)
    return {fqn: _the_one(found) for fqn, found in shapes.items()}


def _the_one(shapes: set[tuple[int, ...]]) -> tuple[int, ...] | None:
    candidates = [shape for shape in shapes if shape not in ((), (1,))] or list(shapes)
    return candidates[0] if len(candidates) == 1 else None


def _target(state: SavedState, like: Any, guessed: tuple[int, ...] | None, group: dist.ProcessGroup) -> Target:
    known = isinstance(like, torch.Tensor)
    wanted = tuple(size_of(like)) if known else guessed
    if known and state.name in _AS_PARAMETER and state.shape != wanted:
        raise LayoutError(
            f"{state.key}: was saved with the shape {state.shape}, but the model's {state.fqn} has {wanted}; "
            "this checkpoint belongs to another model"
        )
    if state.name in SCALAR_STATE or not state.shape or state.shape != wanted:
        return _whole(state)
    nested = known and _is_nested(state, like)
    if isinstance(like, ShardedTensor):
        return _nested(state, like, group) if nested else _as_shards(state, like, (0,) * len(state.shape))
    if isinstance(like, DTensor):
        return _like_dtensor(state, like, group)
    return _whole(state) if known else _chunked(state, group)


def _whole(state: SavedState) -> Target:
    def only(local: Sequence[torch.Tensor]) -> torch.Tensor:
        return local[0]

    return Target(state.key, state.dtype, (replicated(state.shape),), only, only)


def _like_dtensor(state: SavedState, like: DTensor, group: dist.ProcessGroup) -> Target:
    if like.device_mesh.get_coordinate() is None:  # a mesh of other ranks: nothing of it is here
        empty = torch.empty_like(like.to_local(), dtype=state.dtype)
        return Target(state.key, state.dtype, (), lambda _: _dtensor(like, empty), lambda _: _dtensor(like, empty))
    layout = layout_of_tensor(like, name=state.fqn)
    regions = [box.region for box in layout.boxes]

    def result(local: Sequence[torch.Tensor]) -> DTensor:
        return _dtensor(like, local[0].view(like.to_local().shape))

    def in_boxes(local: Sequence[torch.Tensor]) -> Any:
        if len(regions) > 1:
            raise LayoutError(
                f"{state.key}: {like.placements} leaves {len(regions)} boxes of the tensor on this rank, which a planner "
                "can't be told; leave planner out and read with torch's own FileSystemReader"
            )
        return boxes_as_sharded_tensor(
            state.shape, state.dtype, regions=regions, local=local if regions else (), group=group
        )

    # Where two axes cut one dimension, planners don't ask which one cuts first: they are told the box.
    return Target(state.key, state.dtype, (layout,), result, in_boxes if _cuts_a_dimension_twice(like) else result)


def _cuts_a_dimension_twice(tensor: DTensor) -> bool:
    dims = [placement.dim for placement in tensor.placements if hasattr(placement, "dim")]
    return len(set(dims)) < len(dims)


def _dtensor(like: DTensor, local: torch.Tensor) -> DTensor:
    return DTensor.from_local(
        local,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=row_major_strides(like.shape),
    )


def _is_nested(state: SavedState, like: torch.Tensor) -> bool:
    try:
        return is_nested_tensor(like)
    except LayoutError as error:
        raise LayoutError(f"{state.fqn}: {error}") from None


def _nested(state: SavedState, like: ShardedTensor, group: dist.ProcessGroup) -> Target:
    outer = only_shard(like, state.key)
    target = _as_shards(state, inner(outer), outer.metadata.shard_offsets)
    regions = [box.region for layout in target.layouts for box in layout.boxes]

    def for_planner(local: Sequence[torch.Tensor]) -> Any:
        filled = [tensor for tensor in local if tensor.numel()]
        return boxes_as_sharded_tensor(state.shape, state.dtype, regions=regions, local=filled, group=group)

    return Target(state.key, state.dtype, target.layouts, target.result, for_planner)


def _as_shards(state: SavedState, like: ShardedTensor, origin: Sequence[int]) -> Target:
    """As another ShardedTensor stands, whose own origin is at ``origin`` in the saved tensor."""
    own = [shard.metadata for shard in like.local_shards()]
    return _sharded(state, size_of(like), own, like.metadata().shards_metadata, origin, like._process_group)


def _chunked(state: SavedState, group: dist.ProcessGroup) -> Target:
    """Cut along dimension 0 over the group, as torch does with all parameters."""
    properties = TensorProperties(dtype=state.dtype)
    table = create_colwise_spec(group).build_metadata(torch.Size(state.shape), properties).shards_metadata
    # Ranks beyond the rows hold nothing, and the table of shards doesn't mention them; but one it must mention.
    table = [shard for shard in table if 0 not in shard.shard_sizes] or table[:1]
    own = [shard for shard in table if is_here(shard)]
    return _sharded(state, state.shape, own, table, (0,) * len(state.shape), group)


def _sharded(
    state: SavedState,
    size: Sequence[int],
    own: Sequence[ShardMetadata],
    table: Sequence[ShardMetadata],
    origin: Sequence[int],
    group: dist.ProcessGroup,
) -> Target:
    layouts = tuple(_layout(state, region_of(shard, origin)) for shard in own)

    def result(local: Sequence[torch.Tensor]) -> ShardedTensor:
        return sharded_tensor(size, state.dtype, table=table, own=own, local=local, group=group)

    return Target(state.key, state.dtype, layouts, result, result)


def _layout(state: SavedState, region: Region) -> TensorLayout:
    if any(end > length for end, length in zip(region.ends, state.shape, strict=True)):
        raise LayoutError(f"{state.key}: the model's shard {region} lies outside the saved shape {state.shape}")
    return single_box(state.shape, region)
