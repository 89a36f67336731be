"""Plan the result of a load: the path of each saved value, and the layout of each saved tensor on this rank.

State with its parameter's shape is laid out as the parameter; every other tensor is whole on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties
from torch.distributed.tensor import DTensor

from shardferry.checkpoint.catalog import Catalog, SavedTensor
from shardferry.checkpoint.optimizer_state import OptimizerIndex, index_keys, parameter_shape
from shardferry.dcp.sharded_tensors import (
    boxes_as_sharded_tensor,
    create_colwise_spec,
    is_nested_tensor,
    is_own,
    nested_shard,
    region_of,
    sharded_tensor,
    size_of,
)
from shardferry.errors import LayoutError
from shardferry.layout.from_tensor import has_own_chunks, layout_of_tensor
from shardferry.layout.tensor_layout import TensorLayout, replicated, single_box
from shardferry.plan.state_layout import ParameterRule
from shardferry.region import row_major_strides
from shardferry.state_dicts import KeyPath, nest

# State that torch's own optimizers always keep in their parameter's shape: another shape is another model's.
_MOMENTS = frozenset(
    {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "acc_delta"}
)

Build = Callable[[Sequence[torch.Tensor]], Any]


@dataclass(frozen=True)
class Target:
    """One saved tensor in the result: the local tensors that it needs, and what is built of them."""

    key: str
    dtype: torch.dtype
    layouts: tuple[TensorLayout, ...]  # one per local tensor
    result: Build
    for_planner: Build  # of the same local tensors: a tensor that tells any planner their places in the saved tensor


@dataclass(frozen=True)
class ResultPlan:
    """The result of one load, without its values."""

    optimizer_key: str
    paths: Mapping[str, KeyPath]  # of every saved value in the result, by its key in the checkpoint
    targets: tuple[Target, ...]  # one per saved tensor

    def nested(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The result with the values, by key.

        A plain ``optimizer.state_dict()`` keys its state by integers, which torch's writer turns into strings. They become
        integers again if the param groups name their parameters by integers.
        """
        nested: dict[str, Any] = nest({self.paths[key]: value for key, value in values.items()})
        optimizer = nested[self.optimizer_key]
        if isinstance(optimizer, dict) and _is_keyed_by_integers(optimizer):
            state = optimizer["state"]
            by_name = state if isinstance(state, dict) else dict(enumerate(state))
            optimizer["state"] = {int(key): entries for key, entries in by_name.items()}
        return nested


def plan_result(catalog: Catalog, optimizer_key: str, model: Mapping[str, Any], group: dist.ProcessGroup) -> ResultPlan:
    """Plan the result for everything that was saved under the optimizer's key.

    Args:
        model: the model's state dict; values that are not tensors are ignored.
        group: the ranks over which state of unknown parameters is sharded.

    Raises:
        PlanError: nothing is saved under the key.
        LayoutError: a tensor of the model has a layout that is not supported, or is another model's.
    """
    index = index_keys(catalog, optimizer_key)
    tensors = {key: catalog.tensors[key] for key in index.paths if key in catalog.tensors}
    state = {
        fqn: {name: tensors[entry.key] for name, entry in entries.items() if entry.key in tensors}
        for fqn, entries in index.state.items()
    }
    known = {fqn: tensor for fqn in state if isinstance(tensor := model.get(fqn), torch.Tensor)}
    targets = {key: _whole(tensor) for key, tensor in tensors.items()}
    targets |= {target.key: target for target in _targets_of_state(state, known, group)}
    return ResultPlan(optimizer_key, _result_paths(catalog, index), tuple(targets.values()))


def _result_paths(catalog: Catalog, index: OptimizerIndex) -> dict[str, KeyPath]:
    """The paths as they were saved. State whose path was not recorded gets one of its FQN and name."""
    paths = {key: (index.optimizer_key, *below) for key, below in index.paths.items()}
    for fqn, entries in index.state.items():
        for entry in entries.values():
            if len(catalog.path(entry.key)) == 1:
                paths[entry.key] = (index.optimizer_key, "state", fqn, *entry.path)
    return paths


def _targets_of_state(
    state: Mapping[str, Mapping[str, SavedTensor]], known: Mapping[str, torch.Tensor], group: dist.ProcessGroup
) -> Iterator[Target]:
    """Targets of the state tensors that are laid out as their parameters.

    Args:
        state: all state tensors, by FQN and name.
        known: the model's parameters, by FQN.
    """
    shapes = {fqn: tuple(size_of(known[fqn])) if fqn in known else _shape_of(state[fqn]) for fqn in state}
    rule = ParameterRule(state, shapes)
    for fqn, tensors in state.items():
        for name, saved in tensors.items():
            if fqn in known and name in _MOMENTS and saved.shape != shapes[fqn]:
                raise LayoutError(
                    f"{saved.key}: was saved with the shape {saved.shape}, but the model's {fqn} has {shapes[fqn]}; "
                    "this checkpoint belongs to another model"
                )
            if saved.shape and rule.follows(fqn, name, saved):
                yield _as_tensor(saved, fqn, known[fqn], group) if fqn in known else _chunked(saved, group)


def _shape_of(state: Mapping[str, SavedTensor]) -> tuple[int, ...] | None:
    """A parameter's shape by its state alone. Numbers beside larger tensors don't count."""
    larger = {name: tensor for name, tensor in state.items() if tensor.shape not in ((), (1,))}
    return parameter_shape(larger or state)


def _is_keyed_by_integers(optimizer: Mapping[str, Any]) -> bool:
    groups, state = optimizer.get("param_groups"), optimizer.get("state")
    if not isinstance(groups, list) or not isinstance(state, dict | list):
        return False
    named = [parameter for group in groups if isinstance(group, dict) for parameter in group.get("params", ())]
    return bool(named) and all(type(parameter) is int for parameter in named) and all(str(k).isdigit() for k in state)


def _whole(saved: SavedTensor) -> Target:
    return Target(saved.key, saved.dtype, (replicated(saved.shape),), itemgetter(0), itemgetter(0))


def _as_tensor(saved: SavedTensor, fqn: str, like: torch.Tensor, group: dist.ProcessGroup) -> Target:
    """As the model's tensor of the same shape."""
    try:
        is_nested = is_nested_tensor(like)
    except LayoutError as error:
        raise LayoutError(f"{fqn}: {error}") from None
    if isinstance(like, DTensor):
        return _as_dtensor(saved, fqn, like, group)
    if not isinstance(like, ShardedTensor):
        return _whole(saved)
    if not is_nested:
        return _as_shards(saved, like)
    outer, inner = nested_shard(like, saved.key)
    target = _as_shards(saved, inner, outer.shard_offsets)
    return replace(target, for_planner=_boxes(saved, target.layouts, group))


def _as_dtensor(saved: SavedTensor, fqn: str, like: DTensor, group: dist.ProcessGroup) -> Target:
    own = like.to_local()
    is_in_mesh = like.device_mesh.get_coordinate() is not None  # other ranks hold nothing
    layouts = (layout_of_tensor(like, name=fqn),) if is_in_mesh else ()

    def result(local: Sequence[torch.Tensor]) -> DTensor:
        filled = local[0].view(own.shape) if local else torch.empty_like(own, dtype=saved.dtype)
        stride = row_major_strides(like.shape)
        return DTensor.from_local(
            filled, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=stride
        )

    # Planners ignore the order in which two mesh axes cut one dimension, and the result lacks the local tensor's own list of
    # chunks, so they are given the box instead.
    dims = [placement.dim for placement in like.placements if hasattr(placement, "dim")]
    needs_box = is_in_mesh and (len(set(dims)) < len(dims) or has_own_chunks(like))
    for_planner = _boxes(saved, layouts, group, like.placements) if needs_box else result
    return Target(saved.key, saved.dtype, layouts, result, for_planner)


def _boxes(
    saved: SavedTensor, layouts: Sequence[TensorLayout], group: dist.ProcessGroup, placements: object = None
) -> Build:
    """Give a planner the box that each local tensor is of the saved tensor."""

    def boxes(local: Sequence[torch.Tensor]) -> ShardedTensor:
        for layout in layouts:
            if len(layout.boxes) > 1:
                raise LayoutError(
                    f"{saved.key}: {placements} leaves {len(layout.boxes)} boxes of the tensor on this rank, which a planner "
                    "can't be told; leave planner out and read with torch's own FileSystemReader"
                )
        filled = [(box.region, tensor) for layout, tensor in zip(layouts, local, strict=True) for box in layout.boxes]
        return boxes_as_sharded_tensor(saved.shape, saved.dtype, filled, group=group)

    return boxes


def _as_shards(saved: SavedTensor, like: ShardedTensor, origin: Sequence[int] | None = None) -> Target:
    """As a ShardedTensor, which begins at ``origin`` in the saved tensor."""
    own = [shard.metadata for shard in like.local_shards()]
    table = like.metadata().shards_metadata
    return _sharded(saved, size_of(like), own=own, table=table, group=like._process_group, origin=origin)


def _chunked(saved: SavedTensor, group: dist.ProcessGroup) -> Target:
    """Sharded along dimension 0 over the group, as torch shards all parameters."""
    spec = create_colwise_spec(group)
    table = spec.build_metadata(torch.Size(saved.shape), TensorProperties(dtype=saved.dtype)).shards_metadata
    # Ranks beyond the rows hold nothing and are not in the table of shards, which must not be empty.
    table = [shard for shard in table if 0 not in shard.shard_sizes] or table[:1]
    return _sharded(saved, saved.shape, own=list(filter(is_own, table)), table=table, group=group)


def _sharded(
    saved: SavedTensor,
    size: Sequence[int],
    *,
    own: Sequence[ShardMetadata],
    table: Sequence[ShardMetadata],
    group: dist.ProcessGroup,
    origin: Sequence[int] | None = None,
) -> Target:
    regions = [region_of(shard, origin) for shard in own]
    for region in regions:
        if any(end > length for end, length in zip(region.ends, saved.shape, strict=True)):
            raise LayoutError(f"{saved.key}: the model's shard {region} lies outside the saved shape {saved.shape}")

    def result(local: Sequence[torch.Tensor]) -> ShardedTensor:
        return sharded_tensor(size, saved.dtype, table=table, own=own, local=local, group=group)

    layouts = tuple(single_box(saved.shape, region) for region in regions)
    return Target(saved.key, saved.dtype, layouts, result, result)
