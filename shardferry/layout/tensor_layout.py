"""Compute which regions of a tensor one rank holds, and where each of them is in the rank's local tensor.

Most layouts have one region. A flat parameter of FSDP1 has up to ``2 * ndim - 1``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch.distributed.tensor import Placement, Replicate, Shard

from shardferry.errors import LayoutError
from shardferry.region import Region, row_major_strides


def sharded_dim(placement: Placement) -> int | None:
    """The tensor dimension that a placement shards; None for Replicate.

    Raises:
        LayoutError: a placement of another class. Partial holds no whole elements, and torch's _StridedShard is not a
            placement of a spec; in some versions of torch it is a subclass of Shard.
    """
    if type(placement) is Shard:
        return placement.dim
    if isinstance(placement, Replicate):
        return None
    raise LayoutError(f"placement {placement!r} can't be loaded; only Shard and Replicate hold whole elements")


@dataclass(frozen=True, slots=True)
class LocalRegion:
    """A region of the global tensor that one rank holds, and its place in the rank's local tensor.

    ``local`` has the sizes of ``region``. In a flat local tensor it has one dimension instead, with as many elements in
    row-major order.
    """

    region: Region  # in the global tensor
    local: Region  # in the local tensor


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """The regions of one tensor that one rank holds. They are disjoint; an empty shard has none."""

    global_shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    boxes: tuple[LocalRegion, ...]
    placements: tuple[Placement, ...] | None = None  # Shard or Replicate per mesh axis; None: no mesh describes it

    @property
    def local_numel(self) -> int:
        """Elements of the local tensor."""
        return math.prod(self.local_shape)

    @property
    def wanted_numel(self) -> int:
        """Elements of all regions. Less than `local_numel` if no region fills some part of the local tensor."""
        return sum(box.region.numel for box in self.boxes)

    def destination(self, box: LocalRegion) -> tuple[int, tuple[int, ...]]:
        """Where the elements of one of the layout's regions belong in the local tensor's memory.

        Returns:
            The offset of the region's first element, and the stride for each dimension of the global tensor; both in
            elements.
        """
        strides = row_major_strides(self.local_shape)
        offset = sum(o * s for o, s in zip(box.local.offsets, strides, strict=True))
        if box.local.sizes == box.region.sizes:
            return offset, strides
        return offset, row_major_strides(box.region.sizes)


# Most tensors of a model share a few dozen shapes, and the planner recognises one object sooner.
@lru_cache(maxsize=1024)
def replicated(shape: tuple[int, ...], num_axes: int | None = None) -> TensorLayout:
    """The layout of a rank that holds the whole tensor.

    Args:
        shape: the tensor's global shape.
        num_axes: the number of mesh axes, each of which replicates; None if no mesh describes the tensor.
    """
    whole = Region.whole(shape)
    placements = None if num_axes is None else (Replicate(),) * num_axes
    return TensorLayout(shape, shape, (LocalRegion(whole, whole),) if whole.numel else (), placements)


def single_box(shape: Sequence[int], region: Region, placements: tuple[Placement, ...] | None = None) -> TensorLayout:
    """The layout of a rank whose local tensor is exactly one region of the global tensor.

    Args:
        shape: the tensor's global shape.
        region: what the rank holds. That it is inside the shape is not checked.
        placements: by mesh axis, outermost first; None if no mesh describes the tensor.
    """
    box = LocalRegion(region, Region.whole(region.sizes))
    return TensorLayout(tuple(shape), region.sizes, (box,) if region.numel else (), placements)


def flat_slice(shape: Sequence[int], *, start: int, stop: int) -> TensorLayout:
    """The layout of a rank whose 1-dim local tensor is a slice of the flattened global tensor (FSDP1).

    Args:
        shape: the tensor's global shape.
        start, stop: the slice, in elements of the row-major order; ``stop`` is exclusive.
    """
    boxes, position = [], 0
    for region in flat_range(shape, start=start, stop=stop):
        boxes.append(LocalRegion(region, Region((position,), (region.numel,))))
        position += region.numel
    return TensorLayout(tuple(shape), (position,), tuple(boxes))


def flat_range(shape: Sequence[int], *, start: int, stop: int) -> list[Region]:
    """The regions that hold the elements ``start <= i < stop`` of a row-major flattened tensor, in ascending order.

    Each region is contiguous in the flattened tensor; there are at most ``2 * ndim - 1``. With shape (3, 4), 2 to 9 is
    ``[0:1, 2:4], [1:2, 0:4], [2:3, 0:1]``.

    Args:
        shape: the tensor's global shape.
        start, stop: in elements of the row-major order; ``stop`` is exclusive. That both are inside the tensor is not
            checked.
    """
    if start >= stop:
        return []
    if not shape:
        return [Region((), ())]
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), stop // inner  # rows in between are whole

    def part(row: int, begin: int, end: int) -> list[Region]:
        boxes = flat_range(shape[1:], start=begin - row * inner, stop=end - row * inner)
        return [Region((row, *box.offsets), (1, *box.sizes)) for box in boxes]

    if first > last:
        return part(last, start, stop)
    rows = Region((first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:]))
    before, after = part(first - 1, start, first * inner), part(last, last * inner, stop)
    return [*before, *([rows] if first < last else []), *after]


@dataclass(frozen=True, slots=True)
class AxisCut:
    """What one mesh axis does to a tensor, as one rank sees it."""

    num_ranks: int  # of the axis
    index: int  # this rank's, on the axis
    placement: Placement


def shard_on_mesh(shape: Sequence[int], cuts: Sequence[AxisCut]) -> TensorLayout:
    """The layout of one rank, by the placement of each mesh axis.

    A Shard axis splits a dimension into parts of ``ceil(size / num_ranks)``; the last parts may be short or empty. If
    several axes shard one dimension, the innermost axis splits it first, as FSDP2 over TP does. Torch writes that as
    ``(_StridedShard(0, split_factor=tp), Shard(0))``. For 8 rows::

        tp 0     |0 1 2 3|          tp 1     |4 5 6 7|
        dp 0, 1  |0 1|2 3|          dp 0, 1  |4 5|6 7|

    Args:
        shape: the tensor's global shape.
        cuts: one per mesh axis, outermost first; Shard and Replicate.

    Raises:
        LayoutError: a placement names a dimension that the tensor doesn't have, or is neither Shard nor Replicate.
    """
    offsets, sizes = [0] * len(shape), list(shape)
    for cut in reversed(cuts):
        dim = sharded_dim(cut.placement)
        if dim is None:
            continue
        if not shape:
            raise LayoutError(f"Shard({dim}) of a scalar; leave it replicated")
        if not 0 <= dim < len(shape):
            raise LayoutError(
                f"Shard({dim}) asks for dimension {dim} of a tensor with {len(shape)} dimensions {tuple(shape)}; "
                f"shard one of 0 to {len(shape) - 1}"
            )
        full = -(-sizes[dim] // cut.num_ranks)
        start = min(cut.index * full, sizes[dim])
        offsets[dim] += start
        sizes[dim] = min(full, sizes[dim] - start)
    return single_box(shape, Region(tuple(offsets), tuple(sizes)), tuple(cut.placement for cut in cuts))
