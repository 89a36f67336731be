"""Where the elements of one live tensor are on this rank: DTensor, ShardedTensor, CheckpointableTensor, or plain."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DeviceMesh, DTensor

from shardferry.errors import LayoutError
from shardferry.layout.mesh import Placement, Replicate, Shard
from shardferry.layout.tensor_layout import AxisCut, Box, TensorLayout, replicated, sharded, single_box
from shardferry.region import Region

_PROTOCOL = ("global_shape", "global_offsets", "local_offsets", "local_sizes")  # of torch's CheckpointableTensor


def layout_of_tensor(tensor: torch.Tensor, *, name: str) -> TensorLayout:
    """How a live tensor lies on this rank.

    Raises:
        LayoutError: a Partial placement, several local shards that have no memory in common, or placements that don't
            give the local tensor that is there.
    """
    if isinstance(tensor, DTensor):
        return _layout_of_dtensor(tensor, name)
    if isinstance(tensor, ShardedTensor):
        return _layout_of_sharded_tensor(tensor, name)
    if all(hasattr(tensor, field) for field in _PROTOCOL):
        return _layout_of_checkpointable(tensor, name)
    return replicated(tuple(tensor.shape))


@dataclass(frozen=True, slots=True)
class TorchCut:
    """One mesh axis of a DTensor, as torch writes it; ``dim`` None replicates."""

    num_ranks: int
    index: int
    dim: int | None
    split_factor: int = 1  # of a _StridedShard


def _layout_of_dtensor(tensor: DTensor, name: str) -> TensorLayout:
    local_shape = tuple(tensor.to_local().shape)
    return layout_of_placements(tensor.device_mesh, tensor.placements, tuple(tensor.shape), local_shape, name=name)


def layout_of_placements(
    mesh: DeviceMesh,
    placements: Sequence[Any],
    global_shape: tuple[int, ...],
    local_shape: tuple[int, ...],
    *,
    name: str,
) -> TensorLayout:
    """How a DTensor with these placements, whose local tensor has this shape, lies on this rank. Raises LayoutError."""
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise LayoutError(f"{name}: this rank {dist.get_rank()} is not in the tensor's device mesh {mesh}")
    cuts = [
        TorchCut(mesh.size(axis), coordinate[axis], *_cut_of(placement, name))
        for axis, placement in enumerate(placements)
    ]
    candidates = layouts_of_cuts(global_shape, cuts)
    for layout in candidates:
        if layout.local_shape == local_shape or (not layout.local_numel and 0 in local_shape):
            return layout
    raise LayoutError(
        f"{name}: the local tensor has the shape {local_shape}, but placements {tuple(placements)} over {mesh} of "
        f"{global_shape} give {candidates[0].local_shape}; a tensor that lies otherwise than its placements say can't be loaded"
    )


def _cut_of(placement: Any, name: str) -> tuple[int | None, int]:
    if placement.is_replicate():
        return None, 1
    dim = getattr(placement, "dim", None)
    if dim is None or placement.is_partial():
        raise LayoutError(
            f"{name}: placement {placement} can't be loaded; only Shard and Replicate hold whole elements"
        )
    return dim, getattr(placement, "split_factor", 1)


def layouts_of_cuts(shape: tuple[int, ...], cuts: Sequence[TorchCut]) -> list[TensorLayout]:
    """How a DTensor with these cuts may lie, the likeliest first.

    Torch reads placements from left to right. FSDP2 over TP, ``(_StridedShard(0, split_factor=tp), Shard(0))``, was cut
    the other way round: by TP first. The two are the same but for uneven tensors, where the second is what is in memory.
    """
    candidates = [_innermost_first(shape, cuts), _strided_last(shape, cuts), left_to_right(shape, cuts)]
    return [layout for layout in candidates if layout is not None]


def _innermost_first(shape: tuple[int, ...], cuts: Sequence[TorchCut]) -> TensorLayout | None:
    """As `shardferry.layout.tensor_layout.sharded` cuts; None where the split factors say another order."""
    for axis, cut in enumerate(cuts):
        if cut.dim is not None and cut.split_factor != _num_chunks(cuts[axis + 1 :], cut.dim):
            return None
    placements: list[Placement] = [Replicate() if cut.dim is None else Shard(cut.dim) for cut in cuts]
    own = [AxisCut(cut.num_ranks, cut.index, how) for cut, how in zip(cuts, placements, strict=True)]
    return sharded(shape, own)


def _strided_last(shape: tuple[int, ...], cuts: Sequence[TorchCut]) -> TensorLayout | None:
    """As FSDP2, on the outermost axis, cuts what several axes have cut before it; None where this is not such a tensor."""
    strided = [axis for axis, cut in enumerate(cuts) if cut.split_factor > 1]
    if len(strided) != 1:
        return None
    outer, inner = cuts[strided[0]], cuts[strided[0] + 1 :]
    if any(cut.dim == outer.dim for cut in cuts[: strided[0]]) or outer.split_factor != _num_chunks(inner, outer.dim):
        return None
    return left_to_right(shape, [*cuts[: strided[0]], *inner, replace(outer, split_factor=1)])


def _num_chunks(cuts: Sequence[TorchCut], dim: int | None) -> int:
    return math.prod(cut.num_ranks for cut in cuts if cut.dim == dim)


_Runs = list[tuple[int, int]]  # first index and length, ascending; what one rank holds of one dimension


def left_to_right(shape: tuple[int, ...], cuts: Sequence[TorchCut]) -> TensorLayout:
    """Each axis cuts what the axes before it have left; ``_StridedShard`` takes its part of each of ``split_factor`` chunks.

    Source: torch/distributed/tensor/_utils.py, _compute_local_shape_and_global_offset.
    """
    kept: list[_Runs] = [[(0, size)] if size else [] for size in shape]
    for cut in cuts:
        if cut.dim is not None:
            chunks = [_chunk(kept[cut.dim], cut.split_factor, place) for place in range(cut.split_factor)]
            kept[cut.dim] = _joined([run for part in chunks for run in _chunk(part, cut.num_ranks, cut.index)])
    local_shape = tuple(sum(length for _, length in runs) for runs in kept)
    boxes = [
        Box(Region(tuple(r[0] for r in runs), sizes := tuple(r[1] for r in runs)), Region(places, sizes))
        for runs, places in zip(itertools.product(*kept), itertools.product(*map(_places, kept)), strict=True)
    ]
    return TensorLayout(shape, local_shape, tuple(boxes) if math.prod(local_shape) else ())


def _chunk(runs: _Runs, num_chunks: int, index: int) -> _Runs:
    """The ``index``-th of ``num_chunks`` parts, as ``torch.chunk`` cuts: parts of the ceiling, the last short or empty."""
    full = -(-sum(length for _, length in runs) // num_chunks)
    start, stop = index * full, (index + 1) * full
    part: _Runs = []
    position = 0
    for first, length in runs:
        begin, end = max(start, position), min(stop, position + length)
        if begin < end:
            part.append((first + begin - position, end - begin))
        position += length
    return part


def _joined(runs: _Runs) -> _Runs:
    joined: _Runs = []
    for first, length in runs:
        if joined and sum(joined[-1]) == first:
            joined[-1] = (joined[-1][0], joined[-1][1] + length)
        else:
            joined.append((first, length))
    return joined


def _places(runs: _Runs) -> list[int]:
    """Where each run begins in the local tensor."""
    return list(itertools.accumulate((length for _, length in runs), initial=0))[:-1]


def _layout_of_sharded_tensor(tensor: ShardedTensor, name: str) -> TensorLayout:
    shape = tuple(tensor.size())
    shards = tensor.local_shards()
    if not shards:
        return single_box(shape, Region((0,) * len(shape), (0,) * len(shape)))
    if len(shards) > 1:
        raise LayoutError(
            f"{name}: a ShardedTensor with {len(shards)} local shards has no one local tensor to load into; "
            "use a DTensor, or a plain tensor with the fields of torch's CheckpointableTensor"
        )
    meta, inner = shards[0].metadata, shards[0].tensor
    region = Region(tuple(meta.shard_offsets), tuple(meta.shard_sizes))
    if not isinstance(inner, ShardedTensor | DTensor):
        return single_box(shape, region)
    within = layout_of_tensor(inner, name=name)  # FSDP1 over TP: the outer shard is itself sharded
    boxes = (Box(_moved(box.region, region.offsets), box.local) for box in within.boxes)
    return TensorLayout(shape, within.local_shape, tuple(boxes))


def _moved(region: Region, by: tuple[int, ...]) -> Region:
    return Region(tuple(a + b for a, b in zip(region.offsets, by, strict=True)), region.sizes)


def _layout_of_checkpointable(tensor: Any, name: str) -> TensorLayout:
    """A plain tensor that says itself which boxes of a whole it holds, and where (torch 2.14)."""
    shape = tuple(map(int, tensor.global_shape))
    local_shape = tuple(tensor.shape)
    boxes: list[Box] = []
    for there, here, sizes in zip(tensor.global_offsets, tensor.local_offsets, tensor.local_sizes, strict=True):
        box = Box(Region(tuple(map(int, there)), tuple(map(int, sizes))), Region(tuple(map(int, here)), tuple(sizes)))
        if not (_inside(box.region, shape) and _inside(box.local, local_shape)):
            raise LayoutError(
                f"{name}: says that {box.local} of its local shape {local_shape} is {box.region} of {shape}; one of the two is outside"
            )
        if box.region.numel:
            boxes.append(box)
    return TensorLayout(shape, local_shape, tuple(boxes))


def _inside(region: Region, shape: tuple[int, ...]) -> bool:
    fits = len(region.offsets) == len(region.sizes) == len(shape)
    return fits and all(
        o >= 0 and e - o >= 0 and e <= n for o, e, n in zip(region.offsets, region.ends, shape, strict=True)
    )
