"""The ways in which people lay a model out over ranks: how each wraps it, and what stock torch needs to save it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from tests.support.networks import NUM_EXPERTS, NUM_LAYERS, Bundle, Network, numbered

Without = Collection[str]  # FQNs
EMPTY = "odds.none"
EMBED = "embed.weight"


@dataclass(frozen=True)
class Topology:
    """One way to lay the network out."""

    name: str
    world_size: int
    build: Callable[[Without], nn.Module]  # called on each rank
    cuts: str  # what becomes of a matrix: rows, columns, both, whole, flat, or other modules
    unsaved: frozenset[str] = frozenset()  # FQNs that stock torch fails to save from it, or saves wrong
    flattened: bool = False  # the optimizer's state dict: ranks with optimizers of their own need it so

    def __str__(self) -> str:
        return self.name


def _plain(without: Without) -> nn.Module:
    return numbered(Network(without=without))


def _ddp(without: Without) -> nn.Module:
    return nn.parallel.DistributedDataParallel(_plain(without))


def _mesh(**axes: int) -> DeviceMesh:
    return init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))


def _shard_units(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """FSDP2 by layer, as people do; a module of another dtype is a unit of its own. It can't have scalars."""
    scalars = {p for p in model.parameters() if p.ndim == 0}
    for unit in [*model.layers.values(), *([model.bf16] if hasattr(model, "bf16") else [])]:
        fully_shard(unit, mesh=mesh)
    return fully_shard(model, mesh=mesh, ignored_params=scalars)


def _fsdp2(without: Without) -> nn.Module:
    return _shard_units(_plain(without), _mesh(dp=dist.get_world_size()))


def _hsdp(without: Without) -> nn.Module:
    return _shard_units(_plain(without), _mesh(dp_replicate=2, dp_shard=dist.get_world_size() // 2))


def _wrap_fsdp1(model: nn.Module, **options: Any) -> nn.Module:
    """Small units, each with parameters of one param group and dtype."""
    policy = ModuleWrapPolicy({nn.Linear, nn.LayerNorm, nn.Embedding, Bundle})
    scalars = [p for p in model.parameters() if p.ndim == 0]
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, device_id=torch.device("cpu"), ignored_states=scalars, **options
    )


def _fsdp1_flat(without: Without) -> nn.Module:
    return _wrap_fsdp1(_plain(without), use_orig_params=False)


def _fsdp1_orig(without: Without) -> nn.Module:
    return _wrap_fsdp1(_plain(without), use_orig_params=True)


def _fsdp1_dtensor(without: Without) -> nn.Module:
    """With a device mesh, FSDP1's state dicts are of DTensors."""
    return _wrap_fsdp1(_plain(without), use_orig_params=True, device_mesh=_mesh(dp=dist.get_world_size()))


def _fsdp1_hybrid(without: Without) -> nn.Module:
    mesh = _mesh(dp_replicate=2, dp_shard=dist.get_world_size() // 2)
    strategy = ShardingStrategy.HYBRID_SHARD
    return _wrap_fsdp1(_plain(without), use_orig_params=True, device_mesh=mesh, sharding_strategy=strategy)


def _tp_plan(model: nn.Module) -> dict[str, ParallelStyle]:
    """Megatron's: up by rows of its weight, down by columns, the embedding by its rows; norms are replicated."""
    plan: dict[str, ParallelStyle] = (
        {"embed": RowwiseParallel(input_layouts=Replicate())} if _has(model, "embed") else {}
    )
    for layer in model.layers:
        plan[f"layers.{layer}.up"] = ColwiseParallel()
        plan[f"layers.{layer}.down"] = RowwiseParallel()
        plan[f"layers.{layer}.norm"] = SequenceParallel()
    return plan


def _has(model: nn.Module, name: str) -> bool:
    return name in model._modules


def _tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return parallelize_module(model, mesh, _tp_plan(model))


def _tp(without: Without) -> nn.Module:
    return _tensor_parallel(_plain(without), _mesh(tp=dist.get_world_size()))


def _tp_fsdp2(without: Without) -> nn.Module:
    mesh = _mesh(dp=dist.get_world_size() // 2, tp=2)
    return _shard_units(_tensor_parallel(_plain(without), mesh["tp"]), mesh["dp"])


def _tp_hsdp(without: Without) -> nn.Module:
    mesh = _mesh(dp_replicate=2, dp_shard=2, tp=2)
    return _shard_units(_tensor_parallel(_plain(without), mesh["tp"]), mesh["dp_replicate", "dp_shard"])


def _tp_fsdp1(without: Without) -> nn.Module:
    mesh = _mesh(dp=2, tp=2)
    return _wrap_fsdp1(_tensor_parallel(_plain(without), mesh["tp"]), use_orig_params=True, device_mesh=mesh["dp"])


def _stage(without: Without, *, num_stages: int) -> Network:
    """What one rank of a pipeline holds: some layers, and an optimizer of its own for them."""
    stage = dist.get_rank() * num_stages // dist.get_world_size()
    bounds = [NUM_LAYERS * edge // num_stages for edge in (stage, stage + 1)]
    return numbered(Network(layers=range(*bounds), without=without))


def _pipeline(without: Without) -> nn.Module:
    return _stage(without, num_stages=dist.get_world_size())


def _pipeline_fsdp2(without: Without) -> nn.Module:
    mesh = _mesh(pp=2, dp=dist.get_world_size() // 2)
    return _shard_units(_stage(without, num_stages=2), mesh["dp"])


def _with_own_experts(without: Without, mesh: DeviceMesh) -> Network:
    """The stack is cut by expert over the axis; of the experts that are modules, each rank has every n-th."""
    size, index = mesh.size(), mesh.get_local_rank()
    model = numbered(Network(experts=range(index, NUM_EXPERTS, size), without=without))
    for layer in model.layers.values():
        layer.stack.w1 = nn.Parameter(distribute_tensor(layer.stack.w1.detach(), mesh, [Shard(0)]))
    return model


def _experts(without: Without) -> nn.Module:
    return _with_own_experts(without, _mesh(ep=dist.get_world_size()))


def _experts_fsdp2(without: Without) -> nn.Module:
    """As torchtitan does: experts over ep, then over dp by another dimension; everything else over all ranks."""
    mesh = _mesh(dp=dist.get_world_size() // 2, ep=2)
    model = _with_own_experts(without, mesh["ep"])
    for layer in model.layers.values():
        fully_shard(layer.stack, mesh=mesh["dp"], shard_placement_fn=lambda _: Shard(2))
        for expert in layer.expert.values():
            fully_shard(expert, mesh=mesh["dp"])
    return _shard_units(model, _mesh(all=dist.get_world_size()))


def _several_boxes(without: Without) -> nn.Module:
    """Plain tensors that say themselves which rows they hold: of ``2 n`` parts, one from the front and one from the back."""
    model = _plain(without)
    for fqn, parameter in list(model.named_parameters()):
        if parameter.numel() > 1:
            owner, _, name = fqn.rpartition(".")
            setattr(model.get_submodule(owner), name, _held_in_boxes(parameter.detach()))
    return model


def _held_in_boxes(whole: torch.Tensor) -> nn.Parameter:
    rank, num_parts = dist.get_rank(), 2 * dist.get_world_size()
    edges = [whole.shape[0] * edge // num_parts for edge in range(num_parts + 1)]
    spans = [(edges[part], edges[part + 1]) for part in (rank, num_parts - 1 - rank)]
    held = nn.Parameter(torch.cat([whole[start:stop] for start, stop in spans]))
    (start, middle), (resume, end) = spans
    inner = (0,) * (whole.ndim - 1)
    held.global_shape = tuple(whole.shape)
    held.global_offsets = ((start, *inner), (resume, *inner))
    held.local_offsets = ((0, *inner), (middle - start, *inner))
    held.local_sizes = ((middle - start, *whole.shape[1:]), (end - resume, *whole.shape[1:]))
    return held


TOPOLOGIES = (
    Topology("plain", 1, _plain, "whole"),
    Topology("ddp", 2, _ddp, "whole"),
    Topology("fsdp2-2", 2, _fsdp2, "rows"),
    Topology("fsdp2-3", 3, _fsdp2, "rows"),
    Topology("fsdp2-8", 8, _fsdp2, "rows"),
    Topology("hsdp-2x2", 4, _hsdp, "rows"),
    Topology("hsdp-2x3", 6, _hsdp, "rows"),
    Topology("fsdp1-flat", 3, _fsdp1_flat, "flat"),
    Topology("fsdp1-orig", 4, _fsdp1_orig, "flat", unsaved=frozenset({EMPTY})),
    Topology("fsdp1-dtensor", 2, _fsdp1_dtensor, "flat", unsaved=frozenset({EMPTY})),
    Topology("fsdp1-hybrid", 4, _fsdp1_hybrid, "flat", unsaved=frozenset({EMPTY})),
    Topology("tp", 2, _tp, "columns"),
    Topology("tp-4", 4, _tp, "columns"),
    Topology("tp-fsdp2", 4, _tp_fsdp2, "both"),
    Topology("tp-fsdp2-3x2", 6, _tp_fsdp2, "both", unsaved=frozenset({EMBED})),
    Topology("tp-hsdp", 8, _tp_hsdp, "both"),
    Topology("tp-fsdp1", 4, _tp_fsdp1, "both", unsaved=frozenset({EMPTY, EMBED})),
    Topology("pp-2", 2, _pipeline, "stages", flattened=True),
    Topology("pp-3", 3, _pipeline, "stages", flattened=True),
    Topology("pp-fsdp2", 4, _pipeline_fsdp2, "stages", flattened=True),
    Topology("ep", 2, _experts, "experts", flattened=True),
    Topology("ep-3", 3, _experts, "experts", flattened=True),
    Topology("ep-fsdp2", 4, _experts_fsdp2, "experts", flattened=True),
    Topology("boxes", 3, _several_boxes, "boxes"),
)
