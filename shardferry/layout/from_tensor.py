"""Find the layout of a live tensor on this rank: a DTensor, ShardedTensor, CheckpointableTensor or plain tensor.

A local tensor with a ``__create_chunk_list__`` of its own is asked first, as torch's planner does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.tensor import DeviceMesh, DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from shardferry.errors import LayoutError
from shardferry.layout.tensor_layout import (
    AxisCut,
    LocalRegion,
    TensorLayout,
    replicated,
    shard_on_mesh,
    single_box,
)
from shardferry.region import Region

# torch's protocol of tensors that checkpoint themselves: torch/distributed/_checkpointable.py. A DTensor always has it.
_CHUNK_LIST, _SHARD, _WRITE_ITEMS = "__create_chunk_list__", "__get_tensor_shard__", "__create_write_items__"

_PROTOCOL = ("global_shape", "global_offsets", "local_offsets", "local_sizes")  # of torch's CheckpointableTensor


def layout_of_tensor(tensor: torch.Tensor, *, name: str) -> TensorLayout:
    """The layout of a live tensor on this rank.

    Args:
        tensor: of any of the four kinds.
        name: for messages.

    Raises:
        LayoutError: a Partial placement, several local shards that aren't parts of one local tensor, or a local tensor
            whose shape contradicts its placements or its own list of chunks.
    """
    if isinstance(tensor, DTensor):
        return _layout_of_dtensor(tensor, name)
    if isinstance(tensor, ShardedTensor):
        return _layout_of_sharded_tensor(tensor, name)
    if all(hasattr(tensor, field) for field in _PROTOCOL):
        return _layout_of_checkpointable(tensor, name)
    if hasattr(tensor, _CHUNK_LIST):
        return _layout_of_chunks(tensor, _shape_by_write_items(tensor, name), name)
    return replicated(tuple(tensor.shape))


def has_own_chunks(tensor: torch.Tensor) -> bool:
    """Whether a DTensor's local tensor says itself which chunks of the whole it holds. Its placements may say otherwise."""
    return isinstance(tensor, DTensor) and hasattr(_local(tensor), _CHUNK_LIST)


def _local(tensor: DTensor) -> torch.Tensor:
    """The local tensor itself, with the attributes of the object. ``to_local`` may give another one.

    The attribute is private in torch: only this function uses it, and tests/core/test_private_apis.py fails without it.
    """
    return tensor._local_tensor


def _layout_of_dtensor(tensor: DTensor, name: str) -> TensorLayout:
    local, shape = _local(tensor), tuple(tensor.shape)
    candidates = _candidates(tensor.device_mesh, tensor.placements, shape, name)
    if not hasattr(local, _CHUNK_LIST):
        return _fitting(candidates, tensor.device_mesh, tensor.placements, tuple(local.shape), name=name)
    own = _layout_of_chunks(local, shape, name)
    same = (known for known in candidates if (known.boxes, known.local_shape) == (own.boxes, own.local_shape))
    return next(same, own)


def _layout_of_chunks(local: Any, shape: tuple[int, ...], name: str) -> TensorLayout:
    """The layout of a local tensor that lists the chunks that it holds: torch's protocol for checkpoints.

    The list doesn't tell where in the local tensor a chunk is. A single chunk is all of it. Several are found by
    ``__get_tensor_shard__``, which gives views of the local tensor.

    Args:
        shape: of the whole tensor.
    """
    local_shape = tuple(local.shape)
    boxes: list[LocalRegion] = []
    for number, chunk in enumerate(local.__create_chunk_list__()):
        region = _region(chunk.offsets, chunk.sizes)
        if not _is_inside(region, shape):
            raise LayoutError(f"{name}: its __create_chunk_list__ has the chunk {region}, which is not in {shape}")
        if region.numel:
            boxes.append(
                LocalRegion(region, _place_of_chunk(local, region, MetadataIndex(name, chunk.offsets, number)))
            )
    layout = TensorLayout(shape, local_shape, tuple(boxes))
    if layout.wanted_numel != layout.local_numel or _overlap([box.local for box in boxes]):
        raise LayoutError(
            f"{name}: its __create_chunk_list__ has {layout.wanted_numel} elements in {len(boxes)} chunks, but the local "
            f"tensor of the shape {local_shape} has {layout.local_numel}; each of its elements must be in one chunk"
        )
    return layout


def _overlap(regions: Sequence[Region]) -> bool:
    pairs = itertools.combinations(regions, 2)
    return any(one.intersect(other) is not None for one, other in pairs)


def _place_of_chunk(local: Any, region: Region, index: MetadataIndex) -> Region:
    """Where a chunk is in the local tensor. Raises LayoutError where that isn't known."""
    whole = Region.whole(tuple(local.shape))
    if region.sizes == whole.sizes:
        return whole
    if hasattr(local, _SHARD):
        offsets = _offsets_of_view(local.__get_tensor_shard__(index), local)
        place = Region(offsets, region.sizes)
        if _is_inside(place, whole.sizes):
            return place
    raise LayoutError(
        f"{index.fqn}: its __create_chunk_list__ has the chunk {region}, and the local tensor has the shape {whole.sizes}; "
        f"where in it the chunk is must be told by {_SHARD}, as a view of the local tensor"
    )


def _offsets_of_view(view: torch.Tensor, base: torch.Tensor) -> tuple[int, ...]:
    """Where a view begins in the tensor that it is a view of; () for anything else."""
    try:
        distance = (view.data_ptr() - base.data_ptr()) // base.element_size()
        same_storage = view.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # a tensor subclass without memory of its own
        return ()
    if not same_storage or view.stride() != base.stride():
        return ()
    offsets = [0] * base.ndim
    for dim in sorted(range(base.ndim), key=base.stride, reverse=True):
        offsets[dim], distance = divmod(distance, max(base.stride(dim), 1))
    return tuple(offsets)


def _shape_by_write_items(tensor: Any, name: str) -> tuple[int, ...]:
    """The whole shape of a plain tensor that lists its chunks: what it would be saved as, else its own."""
    if not hasattr(tensor, _WRITE_ITEMS):
        return tuple(tensor.shape)
    for item in tensor.__create_write_items__(name, tensor):
        if item.tensor_data is not None:
            return tuple(item.tensor_data.size)
    raise LayoutError(
        f"{name}: its {_WRITE_ITEMS} has no items on this rank, so that the whole tensor's shape is not known; use a DTensor, "
        "or the fields of torch's CheckpointableTensor"
    )


def layout_of_placements(
    mesh: DeviceMesh,
    placements: Sequence[Placement],
    global_shape: tuple[int, ...],
    local_shape: tuple[int, ...],
    *,
    name: str,
) -> TensorLayout:
    """The layout of a DTensor on this rank.

    Args:
        mesh: the DTensor's mesh.
        placements: the DTensor's, by mesh axis.
        global_shape: of the DTensor.
        local_shape: of its local tensor.
        name: for messages.

    Raises:
        LayoutError: this rank is not in the mesh, a placement is Partial, or no order of the axes gives the local
            shape.
    """
    candidates = _candidates(mesh, placements, global_shape, name)
    return _fitting(candidates, mesh, placements, local_shape, name=name)


def _candidates(
    mesh: DeviceMesh, placements: Sequence[Placement], shape: tuple[int, ...], name: str
) -> list[TensorLayout]:
    """The layouts that placements may mean on this rank, the likeliest first. Raises LayoutError."""
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise LayoutError(f"{name}: this rank {dist.get_rank()} is not in the tensor's device mesh {mesh}")
    for placement in placements:
        if placement.is_partial() or (_dim(placement) is None and not placement.is_replicate()):
            raise LayoutError(
                f"{name}: placement {placement!r} can't be loaded; only Shard and Replicate hold whole elements"
            )
    cuts = [AxisCut(mesh.size(axis), coordinate[axis], placement) for axis, placement in enumerate(placements)]
    # Torch reads placements from left to right. FSDP2 over TP, `(_StridedShard(0, split_factor=tp), Shard(0))`, was sharded by
    # TP first. Both orders give one layout if tensors are even; of uneven tensors, memory has the second. The local shape tells.
    orders = (_innermost_first, _strided_last, shard_left_to_right)  # the likeliest first
    return [layout for order in orders if (layout := order(shape, cuts)) is not None]


def _fitting(
    candidates: Sequence[TensorLayout],
    mesh: DeviceMesh,
    placements: Sequence[Placement],
    local_shape: tuple[int, ...],
    *,
    name: str,
) -> TensorLayout:
    """The first candidate with the local tensor's shape. Raises LayoutError."""
    for layout in candidates:
        if layout.local_shape == local_shape or (not layout.local_numel and 0 in local_shape):
            return layout
    raise LayoutError(
        f"{name}: the local tensor has the shape {local_shape}, but placements {tuple(placements)} over {mesh} of "
        f"{candidates[0].global_shape} give {candidates[0].local_shape}; a tensor whose local shape contradicts its placements can't be loaded"
    )


def _dim(placement: Placement) -> int | None:
    """The dimension that a Shard or _StridedShard shards; None for Replicate."""
    return getattr(placement, "dim", None)


def _split_factor(placement: Placement) -> int:
    return getattr(placement, "split_factor", 1)


def _innermost_first(shape: tuple[int, ...], cuts: Sequence[AxisCut]) -> TensorLayout | None:
    """As `shard_on_mesh` does; None if the split factors ask for another order."""
    plain: list[AxisCut] = []
    for axis, cut in enumerate(cuts):
        dim = _dim(cut.placement)
        if dim is not None and _split_factor(cut.placement) != _num_parts(cuts[axis + 1 :], dim):
            return None
        plain.append(replace(cut, placement=Replicate() if dim is None else Shard(dim)))
    return shard_on_mesh(shape, plain)


def _strided_last(shape: tuple[int, ...], cuts: Sequence[AxisCut]) -> TensorLayout | None:
    """As FSDP2 does on the outermost axis if several inner axes shard the dimension; None if this is another case."""
    strided = [axis for axis, cut in enumerate(cuts) if _split_factor(cut.placement) > 1]
    if len(strided) != 1:
        return None
    outer, before, inner = cuts[strided[0]], cuts[: strided[0]], cuts[strided[0] + 1 :]
    dim = _dim(outer.placement)
    if dim is None or any(_dim(cut.placement) == dim for cut in before):
        return None
    if _split_factor(outer.placement) != _num_parts(inner, dim):
        return None
    return shard_left_to_right(shape, [*before, *inner, replace(outer, placement=Shard(dim))])


def _num_parts(cuts: Sequence[AxisCut], dim: int) -> int:
    """The number of parts into which some axes split a dimension."""
    return math.prod(cut.num_ranks for cut in cuts if _dim(cut.placement) == dim)


_Runs = list[tuple[int, int]]  # first index and length, ascending: the indices of one dimension that one rank holds


def shard_left_to_right(shape: tuple[int, ...], cuts: Sequence[AxisCut]) -> TensorLayout:
    """The layout of one rank if each axis splits what the axes before it have left, as torch reads placements.

    A _StridedShard first splits the dimension into ``split_factor`` parts, and then each of these among its ranks.
    Source: torch/distributed/tensor/_utils.py, _compute_local_shape_and_global_offset.

    Args:
        shape: the tensor's global shape.
        cuts: one per mesh axis, outermost first; Shard, _StridedShard and Replicate. It is not checked that they fit
            the shape.
    """
    kept: list[_Runs] = [[(0, size)] if size else [] for size in shape]
    for cut in cuts:
        dim, num_parts = _dim(cut.placement), _split_factor(cut.placement)
        if dim is not None:
            parts = [_part(kept[dim], num_parts, index) for index in range(num_parts)]
            kept[dim] = _joined([run for part in parts for run in _part(part, cut.num_ranks, cut.index)])
    local_shape = tuple(sum(length for _, length in runs) for runs in kept)
    boxes = [
        LocalRegion(Region(tuple(r[0] for r in runs), sizes := tuple(r[1] for r in runs)), Region(offsets, sizes))
        for runs, offsets in zip(itertools.product(*kept), itertools.product(*map(_local_offsets, kept)), strict=True)
    ]
    return TensorLayout(shape, local_shape, tuple(boxes) if math.prod(local_shape) else ())


def _part(runs: _Runs, num_parts: int, index: int) -> _Runs:
    """One of ``num_parts`` parts, as ``torch.chunk`` splits: each has the ceiling, the last ones are short or empty."""
    full = -(-sum(length for _, length in runs) // num_parts)
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
    """The same indices in as few runs as possible."""
    joined: _Runs = []
    for first, length in runs:
        if joined and sum(joined[-1]) == first:
            joined[-1] = (joined[-1][0], joined[-1][1] + length)
        else:
            joined.append((first, length))
    return joined


def _local_offsets(runs: _Runs) -> list[int]:
    """The index in the local tensor at which each run begins."""
    return list(itertools.accumulate((length for _, length in runs), initial=0))[:-1]


def _layout_of_sharded_tensor(tensor: ShardedTensor, name: str) -> TensorLayout:
    shape = tuple(tensor.size())
    shards = tensor.local_shards()
    if not shards:
        return single_box(shape, Region((0,) * len(shape), (0,) * len(shape)))
    if len(shards) > 1:
        raise LayoutError(
            f"{name}: a ShardedTensor with {len(shards)} local shards has no single local tensor to load into; "
            "use a DTensor, or a plain tensor with the fields of torch's CheckpointableTensor"
        )
    meta, inner = shards[0].metadata, shards[0].tensor
    region = Region(tuple(meta.shard_offsets), tuple(meta.shard_sizes))
    if not isinstance(inner, ShardedTensor | DTensor):
        return single_box(shape, region)
    within = layout_of_tensor(inner, name=name)  # FSDP1 over TP: the outer shard is itself sharded
    before = tuple(-offset for offset in region.offsets)
    boxes = (LocalRegion(box.region.relative_to(before), box.local) for box in within.boxes)
    return TensorLayout(shape, within.local_shape, tuple(boxes))


def _layout_of_checkpointable(tensor: Any, name: str) -> TensorLayout:
    """The layout of a plain tensor that names the regions that it holds, and their local places (torch 2.14)."""
    shape = tuple(map(int, tensor.global_shape))
    local_shape = tuple(tensor.shape)
    boxes: list[LocalRegion] = []
    for there, here, sizes in zip(tensor.global_offsets, tensor.local_offsets, tensor.local_sizes, strict=True):
        box = LocalRegion(_region(there, sizes), _region(here, sizes))
        if not (_is_inside(box.region, shape) and _is_inside(box.local, local_shape)):
            raise LayoutError(
                f"{name}: the tensor says that {box.local} of its local shape {local_shape} is {box.region} of {shape}; "
                "one of the two is out of bounds"
            )
        if box.region.numel:
            boxes.append(box)
    return TensorLayout(shape, local_shape, tuple(boxes))


def _region(offsets: Sequence[int], sizes: Sequence[int]) -> Region:
    return Region(tuple(map(int, offsets)), tuple(map(int, sizes)))


def _is_inside(region: Region, shape: tuple[int, ...]) -> bool:
    fits = len(region.offsets) == len(region.sizes) == len(shape)
    return fits and all(
        o >= 0 and e - o >= 0 and e <= n for o, e, n in zip(region.offsets, region.ends, shape, strict=True)
    )


def dtensor_placements(layout: TensorLayout, mesh: DeviceMesh) -> list[Placement]:
    """The placements of a DTensor whose local tensor has a layout, by mesh axis.

    They are the layout's own, but for a Shard whose dimension inner axes shard too: torch needs a _StridedShard there.

    Args:
        layout: one with placements, as `shard_on_mesh` gives it.
        mesh: with as many axes as the layout has placements, of the same sizes.
    """
    assert layout.placements is not None
    result: list[Placement] = []
    for axis, placement in enumerate(layout.placements):
        inner = range(axis + 1, mesh.ndim)
        num_parts = math.prod(mesh.size(later) for later in inner if layout.placements[later] == placement)
        dim = _dim(placement)
        result.append(placement if dim is None or num_parts == 1 else strided_shard(dim, num_parts))
    return result


def strided_shard(dim: int, split_factor: int) -> Placement:
    """FSDP2's placement over TP: the dimension was split into ``split_factor`` parts first.

    The class is private in torch: only this module and tests/core/test_private_apis.py use it.
    """
    return _StridedShard(dim, split_factor=split_factor)
