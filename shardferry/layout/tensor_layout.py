"""Say which region of a tensor a rank holds, and what anything that knows a rank's wishes has to answer.

A `TensorLayout` is the answer for one tensor on one rank: boxes of the whole tensor, and where each lies in the rank's
local tensor. Usually that is one box; a flat parameter of FSDP1 takes up to ``2 * ndim - 1``. A `RankLayout` gives one for
each tensor: from a mesh and rules (spec_layout.py), or from live tensors (live_layout.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import torch

from shardferry.errors import LayoutError
from shardferry.layout.mesh import Mesh, Placement, Replicate
from shardferry.region import Region, flat_range, row_major_strides

if TYPE_CHECKING:
    from shardferry.layout.spec import SpecLayout


@dataclass(frozen=True, slots=True)
class Box:
    """One box of the whole tensor and where it lies in the local one.

    ``local`` has the box's sizes; or, where the local tensor is flat, one dimension with as many elements, row-major.
    """

    region: Region  # in the whole tensor
    local: Region  # in the local tensor


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """What one rank holds of one tensor. Boxes are disjoint; empty shards have none."""

    global_shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    placements: tuple[Placement, ...] | None = None  # by mesh axis; None where no mesh describes it

    @property
    def local_numel(self) -> int:
        return math.prod(self.local_shape)

    @property
    def wanted_numel(self) -> int:
        return sum(box.region.numel for box in self.boxes)

    def destination(self, box: Box) -> tuple[int, tuple[int, ...]]:
        """Offset and strides, in elements of the local tensor's memory, of a box indexed as in the whole tensor."""
        strides = row_major_strides(self.local_shape)
        offset = sum(o * s for o, s in zip(box.local.offsets, strides, strict=True))
        if box.local.sizes == box.region.sizes:
            return offset, strides
        return offset, row_major_strides(box.region.sizes)


class NumberedLayouts:
    """Numbers some layouts by their first appearance; many thousand tensors have a few dozen."""

    def __init__(self) -> None:
        self._numbers: dict[TensorLayout, int] = {}
        self._known: dict[int, tuple[int, TensorLayout]] = {}  # by id, which the layout keeps from being used again

    def number(self, layout: TensorLayout) -> int:
        """Equal for equal layouts alone."""
        known = self._known.get(id(layout))
        if known is None:
            number = self._numbers.setdefault(layout, len(self._numbers))
            known = self._known[id(layout)] = (number, layout)
        return known[0]

    def words(self) -> object:
        """All of them by number, in values that JSON takes; which placements made the boxes is not told."""
        return [
            (
                *(layout.global_shape, layout.local_shape),
                [(b.region.offsets, b.region.sizes, b.local.offsets, b.local.sizes) for b in layout.boxes],
            )
            for layout in self._numbers
        ]


@lru_cache(maxsize=65536)
def replicated(shape: tuple[int, ...], num_axes: int | None = None) -> TensorLayout:
    """The whole tensor on every rank."""
    whole = Region.whole(shape)
    placements = None if num_axes is None else (Replicate(),) * num_axes
    return TensorLayout(shape, shape, (Box(whole, whole),) if whole.numel else (), placements)


def single_box(shape: Sequence[int], region: Region, placements: tuple[Placement, ...] | None = None) -> TensorLayout:
    """A local tensor that is exactly one box of the whole."""
    box = Box(region, Region.whole(region.sizes))
    return TensorLayout(tuple(shape), region.sizes, (box,) if region.numel else (), placements)


def flat_slice(shape: Sequence[int], *, start: int, stop: int) -> TensorLayout:
    """A local 1-dim tensor that holds the elements ``start`` to ``stop`` (exclusive) of the row-major flattened whole."""
    boxes, position = [], 0
    for region in flat_range(shape, start=start, stop=stop):
        boxes.append(Box(region, Region((position,), (region.numel,))))
        position += region.numel
    return TensorLayout(tuple(shape), (position,), tuple(boxes))


@dataclass(frozen=True, slots=True)
class AxisCut:
    """One mesh axis as seen by one rank: how many ranks, which of them, and what it does to the tensor."""

    num_ranks: int
    index: int
    placement: Placement


def sharded(shape: Sequence[int], cuts: Sequence[AxisCut]) -> TensorLayout:
    """One rank's box of a tensor.

    Axes that cut the same dimension cut it innermost first, as FSDP2 over TP does (torch writes that layout as
    ``(_StridedShard(0, split_factor=tp), Shard(0))``): 8 rows over dp 2 x tp 2 give dp 0, tp 1 the rows 4 and 5.

    Args:
        cuts: by mesh axis, outermost first.

    Raises:
        LayoutError: a placement names a dimension that the tensor hasn't.
    """
    offsets, sizes = [0] * len(shape), list(shape)
    for cut in reversed(cuts):
        if isinstance(cut.placement, Replicate):
            continue
        dim = cut.placement.dim
        if dim >= len(shape):
            raise LayoutError(
                f"{cut.placement} asks for dimension {dim} of a tensor with {len(shape)} dimensions {tuple(shape)}; "
                f"shard one of 0 to {len(shape) - 1}"
                if shape
                else f"{cut.placement} of a scalar; leave it replicated"
            )
        full = -(-sizes[dim] // cut.num_ranks)
        start = min(cut.index * full, sizes[dim])
        offsets[dim] += start
        sizes[dim] = min(full, sizes[dim] - start)
    return single_box(shape, Region(tuple(offsets), tuple(sizes)), tuple(cut.placement for cut in cuts))


class RankLayout(Protocol):
    """What one rank wants."""

    @property
    def world_rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def mesh(self) -> Mesh | None: ...

    @property
    def spec(self) -> SpecLayout | None:
        """The spec that says what every rank wants; None where each knows of itself alone."""

    def fqns(self) -> Sequence[str] | None:
        """Parameters whose state this rank wants; None for those that the checkpoint has and `holds` admits."""

    def holds(self, fqn: str) -> bool:
        """Whether this rank has anything of a parameter."""

    def parameter_shape(self, fqn: str) -> tuple[int, ...] | None:
        """The whole parameter's shape where it is known without the checkpoint."""

    def parameter(self, fqn: str, shape: tuple[int, ...]) -> TensorLayout:
        """How state with its parameter's shape lies on this rank. Raises LayoutError."""

    def entry(self, fqn: str, name: str, shape: tuple[int, ...]) -> TensorLayout | None:
        """How one state entry lies where that is known for itself; None: by its shape. Raises LayoutError."""

    def dtype(self, fqn: str, name: str) -> torch.dtype | None:
        """The dtype that one state entry, or with an empty name the parameter, has here; None where any will do."""

    def weights(self) -> Sequence[str] | None:
        """Parameters and buffers whose values this rank wants; None for those that the checkpoint has."""

    def weight(self, fqn: str, shape: tuple[int, ...]) -> TensorLayout:
        """How a parameter or a buffer lies on this rank. Raises LayoutError."""

    def aliases(self, fqn: str) -> Sequence[str]:
        """Other names of the same (tied) parameter."""

    def positions(self) -> Sequence[Sequence[str]] | None:
        """The FQNs of each live param group in order, for state that was saved by position; None where not known."""

    def may_lack(self, fqn: str) -> bool:
        """Whether it is no loss when nothing is saved for a parameter: it is frozen."""
