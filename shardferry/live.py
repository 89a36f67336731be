"""Ask a live model and optimizer which parameters they hold, under which FQN, and which part of each is here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DeviceMesh, DTensor
from torch.distributed.tensor import placement_types as torch_placements

from shardferry import fsdp1
from shardferry.errors import InstallError, LayoutError
from shardferry.layout import (
    AxisCut,
    Box,
    LiveLayout,
    Mesh,
    Placement,
    Replicate,
    Shard,
    TensorLayout,
    replicated,
    sharded,
)
from shardferry.region import Region
from shardferry.wrappers import param_groups

# What wrappers put into the names of parameters; the checkpoint's FQNs are without them.
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "_forward_module.")


@dataclass(frozen=True, slots=True)
class Part:
    """What a live parameter holds of one FQN."""

    fqn: str
    layout: TensorLayout
    position: int = 0  # elements, where it begins in the live parameter's local memory


@dataclass(frozen=True)
class LiveParameter:
    """One tensor that an optimizer trains."""

    tensor: torch.Tensor  # as the optimizer knows it: the key of its state
    parts: tuple[Part, ...]  # one, or several where FSDP1 has flattened parameters together
    has_state: bool = True  # FSDP1 takes no step on a slice that is empty here, and gathers state by who has some

    @property
    def local(self) -> torch.Tensor:
        """The memory of this rank."""
        return self.tensor.to_local() if isinstance(self.tensor, DTensor) else self.tensor


def clean_fqn(name: str) -> str:
    """A parameter's name without what wrappers added."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def live_parameters(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[list[LiveParameter]]:
    """The optimizer's parameters, by param group.

    Raises:
        InstallError: the optimizer trains a tensor that is no parameter of the model.
        LayoutError: a parameter lies in a way that isn't supported.
    """
    known: dict[int, LiveParameter] = {}
    module = model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model
    for flat in fsdp1.flattened_parameters(module):
        parts = tuple(Part(clean_fqn(p.fqn), p.layout, p.position) for p in flat.parts)
        known[id(flat.tensor)] = LiveParameter(flat.tensor, parts, has_state=flat.tensor.numel() > 0)
    for name, parameter in module.named_parameters():
        if id(parameter) not in known:
            fqn = clean_fqn(name)
            known[id(parameter)] = LiveParameter(parameter, (Part(fqn, layout_of_tensor(parameter, name=fqn)),))
    return [
        [_known(known, parameter, place=(index, place)) for place, parameter in enumerate(group["params"])]
        for index, group in enumerate(param_groups(optimizer))
    ]


def _known(known: dict[int, LiveParameter], parameter: torch.Tensor, place: tuple[int, int]) -> LiveParameter:
    found = known.get(id(parameter))
    if found is None:
        raise InstallError(
            f"param_groups[{place[0]}]['params'][{place[1]}] of shape {tuple(parameter.shape)} is no parameter of the model; "
            "give the model that the optimizer was made for (after wrapping)"
        )
    return found


def live_layout(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, world_rank: int, world_size: int
) -> LiveLayout:
    """The layout that a live optimizer wants. Raises InstallError, LayoutError."""
    parameters: dict[str, TensorLayout] = {}
    for group in live_parameters(model, optimizer):
        for parameter in group:
            parameters.update({part.fqn: part.layout for part in parameter.parts})
    return LiveLayout(world_rank, world_size, parameters)


def layout_of_tensor(tensor: torch.Tensor, *, name: str) -> TensorLayout:
    """How a DTensor, a ShardedTensor or a plain tensor lies on this rank.

    Raises:
        LayoutError: a Partial placement, a nested tensor, or a strided shard that doesn't come from FSDP2 over TP.
    """
    if isinstance(tensor, DTensor):
        return _layout_of_dtensor(tensor, name)
    if isinstance(tensor, ShardedTensor):
        return _layout_of_sharded_tensor(tensor, name)
    return replicated(tuple(tensor.shape))


def _layout_of_dtensor(tensor: DTensor, name: str) -> TensorLayout:
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise LayoutError(f"{name}: this rank {dist.get_rank()} is not in the tensor's device mesh {mesh}")
    placements = translate_placements(tensor.placements, mesh, name)
    cuts = [AxisCut(mesh.size(axis), coordinate[axis], placements[axis]) for axis in range(mesh.ndim)]
    layout = sharded(tuple(tensor.shape), cuts)
    local = tuple(tensor.to_local().shape)
    if local != layout.local_shape and not (0 in local and 0 in layout.local_shape):
        raise LayoutError(
            f"{name}: the local tensor has the shape {local}, placements {tensor.placements} over {mesh} of {tuple(tensor.shape)} "
            f"give {layout.local_shape}; this kind of uneven sharding is not supported"
        )
    return layout


def translate_placements(
    placements: Sequence[torch_placements.Placement], mesh: DeviceMesh, name: str
) -> tuple[Placement, ...]:
    """Torch's placements as ours, by mesh axis.

    ``(_StridedShard(0, split_factor=tp), Shard(0))`` is what FSDP2 over TP gives: the inner axis cuts first. That is how
    ours are read (see `shardferry.layout.sharded`), so that plain ``(Shard(0), Shard(0))``, where the outer axis cuts
    first, is the one that has no translation.
    """
    translated: list[Placement] = []
    for axis, placement in enumerate(placements):
        if placement.is_replicate():
            translated.append(Replicate())
            continue
        dim = getattr(placement, "dim", None)
        if dim is None or placement.is_partial():
            raise LayoutError(
                f"{name}: placement {placement} can't be loaded; only Shard and Replicate hold whole elements"
            )
        inner = 1
        for later in range(axis + 1, mesh.ndim):
            if getattr(placements[later], "dim", None) == dim:
                inner *= mesh.size(later)
        if getattr(placement, "split_factor", 1) != inner:
            raise LayoutError(
                f"{name}: placements {tuple(placements)} cut dimension {dim} in an order that is not supported; "
                "FSDP2 over TP (the inner axis cuts first) is"
            )
        translated.append(Shard(dim))
    return tuple(translated)


def _layout_of_sharded_tensor(tensor: ShardedTensor, name: str) -> TensorLayout:
    shape = tuple(tensor.size())
    shards = tensor.local_shards()
    if not shards:
        empty = Region((0,) * len(shape), (0,) * len(shape))
        return TensorLayout(shape, empty.sizes, ())
    if len(shards) > 1 or isinstance(shards[0].tensor, ShardedTensor | DTensor):
        kind = f"{len(shards)} local shards" if len(shards) > 1 else f"a nested {type(shards[0].tensor).__name__}"
        raise LayoutError(f"{name}: a ShardedTensor with {kind} is not supported; use DTensors (FSDP2)")
    meta = shards[0].metadata
    region = Region(tuple(meta.shard_offsets), tuple(meta.shard_sizes))
    box = Box(region, Region.whole(region.sizes))
    return TensorLayout(shape, region.sizes, (box,) if region.numel else ())


def mesh_of(device_mesh: DeviceMesh) -> Mesh:
    """A torch device mesh as ours: names and sizes."""
    names = device_mesh.mesh_dim_names or tuple(f"axis{axis}" for axis in range(device_mesh.ndim))
    return Mesh(tuple((name, device_mesh.size(axis)) for axis, name in enumerate(names)))
