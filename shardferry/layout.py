"""Say which region of each tensor each rank wants: from a mesh and placement rules, or from live tensors.

A `TensorLayout` is the answer for one tensor on one rank: boxes of the whole tensor, and where each lies in the rank's
local tensor. Usually that is one box; a flat parameter of FSDP1 takes up to ``2 * ndim - 1``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Protocol

import torch

from shardferry.errors import LayoutError
from shardferry.region import Region, flat_range, row_major_strides


@dataclass(frozen=True, slots=True)
class Replicate:
    """Every rank of the axis holds the same."""

    def __str__(self) -> str:
        return "Replicate"


@dataclass(frozen=True, slots=True)
class Shard:
    """The axis cuts dimension ``dim`` into chunks of ``ceil(size / ranks)``; the last ones may be short or empty."""

    dim: int

    def __str__(self) -> str:
        return f"Shard({self.dim})"


Placement = Replicate | Shard

_PLACEMENT = re.compile(r"\s*(?:Replicate(?:\(\s*\))?|Shard\(\s*(?:dim\s*=\s*)?(\d+)\s*\))\s*")


def parse_placement(text: str) -> Placement:
    """``"Shard(0)"`` or ``"Replicate"``. Raises LayoutError for anything else."""
    match = _PLACEMENT.fullmatch(text)
    if match is None:
        raise LayoutError(f"{text!r} is no placement; write 'Shard(<dim>)' or 'Replicate'")
    return Replicate() if match[1] is None else Shard(int(match[1]))


@dataclass(frozen=True, slots=True)
class Mesh:
    """Named axes with their sizes, outermost first: rank ``r`` stands at the row-major coordinate of ``r``."""

    axes: tuple[tuple[str, int], ...]

    @property
    def size(self) -> int:
        return math.prod(size for _, size in self.axes)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.axes)

    def coordinate(self, world_rank: int) -> tuple[int, ...]:
        coordinate = []
        for _, size in reversed(self.axes):
            world_rank, index = divmod(world_rank, size)
            coordinate.append(index)
        return tuple(reversed(coordinate))

    def __str__(self) -> str:
        return " x ".join(f"{name}={size}" for name, size in self.axes)


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


@dataclass(frozen=True, slots=True)
class Rule:
    """Placements for the parameters whose FQN matches a shell glob; axes that aren't named replicate.

    With ``state``, a glob over state names, the rule is for those entries alone, whatever their shape.
    """

    match: str
    placements: Mapping[str, Placement]
    state: str | None = None


@dataclass(frozen=True, slots=True)
class HeldBy:
    """Parameters that only some coordinates of some axes have: the layers of a pipeline stage, the experts of a rank."""

    match: str  # shell glob over FQNs
    ranks: Mapping[str, tuple[int, ...]]  # axis: its coordinates


@dataclass(frozen=True)
class SpecLayout:
    """A target topology as people write it: a mesh, rules of which the first match wins, and a default."""

    mesh: Mesh
    rules: tuple[Rule, ...] = ()
    default: Mapping[str, Placement] | None = None
    held_by: tuple[HeldBy, ...] = ()

    def __post_init__(self) -> None:
        for where, axes in self._axes():
            for axis in axes:
                if axis not in self.mesh.names:
                    raise LayoutError(
                        f"{where}: axis {axis!r} is not in the mesh, which has {', '.join(self.mesh.names)}"
                    )
        sizes = dict(self.mesh.axes)
        for held in self.held_by:
            for axis, ranks in held.ranks.items():
                if not ranks or not all(0 <= rank < sizes[axis] for rank in ranks):
                    raise LayoutError(
                        f"held_by {held.match!r}: {axis}: {list(ranks)} are no coordinates of an axis of {sizes[axis]}; "
                        f"give some of 0 to {sizes[axis] - 1}"
                    )

    def _axes(self) -> list[tuple[str, Mapping[str, object]]]:
        rules = [(f"rule {rule.match!r}", rule.placements) for rule in self.rules]
        held = [(f"held_by {held.match!r}", held.ranks) for held in self.held_by]
        return [*rules, ("default", self.default or {}), *held]

    @property
    def world_size(self) -> int:
        return self.mesh.size

    def rank(self, world_rank: int) -> RankLayout:
        """The layout as one rank sees it."""
        return _SpecRank(self, world_rank)

    def placements(self, fqn: str, state: str | None = None) -> tuple[Placement, ...] | None:
        """By mesh axis, outermost first. With a state name: of the rule for that entry, None where there is none."""
        of_entries = state is not None
        for rule in self.rules:
            wanted = rule.state is not None and fnmatchcase(state or "", rule.state) if of_entries else not rule.state
            if wanted and fnmatchcase(fqn, rule.match):
                return self._by_axis(rule.placements)
        return None if of_entries else self._by_axis(self.default or {})

    def _by_axis(self, placements: Mapping[str, Placement]) -> tuple[Placement, ...]:
        return tuple(placements.get(axis, Replicate()) for axis in self.mesh.names)

    def holds(self, fqn: str, coordinate: Sequence[int]) -> bool:
        """Whether the rank at a coordinate has anything of a parameter. For each axis the first match decides."""
        for axis, index in zip(self.mesh.names, coordinate, strict=True):
            ranks = next((h.ranks[axis] for h in self.held_by if axis in h.ranks and fnmatchcase(fqn, h.match)), None)
            if ranks is not None and index not in ranks:
                return False
        return True


@dataclass(frozen=True)
class _SpecRank:
    spec: SpecLayout
    world_rank: int

    @property
    def world_size(self) -> int:
        return self.spec.world_size

    @property
    def mesh(self) -> Mesh:
        return self.spec.mesh

    def fqns(self) -> None:
        return None

    def holds(self, fqn: str) -> bool:
        return not self.spec.held_by or self.spec.holds(fqn, self.mesh.coordinate(self.world_rank))

    def parameter_shape(self, fqn: str) -> None:
        return None

    def parameter(self, fqn: str, shape: tuple[int, ...]) -> TensorLayout:
        placements = self.spec.placements(fqn)
        assert placements is not None
        return self._cut(fqn, shape, placements)

    def entry(self, fqn: str, name: str, shape: tuple[int, ...]) -> TensorLayout | None:
        placements = self.spec.placements(fqn, name)
        return None if placements is None else self._cut(f"{fqn}: {name!r}", shape, placements)

    def dtype(self, fqn: str, name: str) -> None:
        return None

    def weights(self) -> None:
        return None

    def weight(self, fqn: str, shape: tuple[int, ...]) -> TensorLayout:
        return self.parameter(fqn, shape) if shape else replicated(shape, len(self.mesh.axes))

    def aliases(self, fqn: str) -> tuple[str, ...]:
        return ()

    def positions(self) -> None:
        return None

    def may_lack(self, fqn: str) -> bool:
        return False

    def _cut(self, where: str, shape: tuple[int, ...], placements: Sequence[Placement]) -> TensorLayout:
        coordinate = self.mesh.coordinate(self.world_rank)
        cuts = [
            AxisCut(size, index, placement)
            for (_, size), index, placement in zip(self.mesh.axes, coordinate, placements, strict=True)
        ]
        try:
            return sharded(shape, cuts)
        except LayoutError as error:
            raise LayoutError(f"{where}: {error}") from None


@dataclass(frozen=True, slots=True)
class LiveEntry:
    """One state entry that a live optimizer has already."""

    layout: TensorLayout | None  # None: as its parameter
    dtype: torch.dtype


@dataclass(frozen=True)
class LiveLayout:
    """What the live model of one rank holds: a layout for each parameter that its optimizer trains."""

    world_rank: int
    world_size: int
    parameters: Mapping[str, TensorLayout]
    mesh: Mesh | None = None
    spec: SpecLayout | None = None
    entries: Mapping[tuple[str, str], LiveEntry] = field(default_factory=dict)  # by FQN and state name
    tied: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # FQN: the parameter's other names
    frozen: frozenset[str] = frozenset()
    groups: tuple[tuple[str, ...], ...] | None = None  # FQNs of each param group; None: flat parameters have no order
    buffers: Mapping[str, TensorLayout] = field(default_factory=dict)  # what a model has besides its parameters
    untrained: Mapping[str, TensorLayout] = field(default_factory=dict)  # parameters of no optimizer
    extras: frozenset[str] = frozenset()  # FQNs of modules' extra states
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)  # of parameters and buffers

    def fqns(self) -> Sequence[str]:
        return tuple(self.parameters)

    def holds(self, fqn: str) -> bool:
        return fqn in self.parameters

    def parameter_shape(self, fqn: str) -> tuple[int, ...] | None:
        layout = self.parameters.get(fqn)
        return None if layout is None else layout.global_shape

    def parameter(self, fqn: str, shape: tuple[int, ...]) -> TensorLayout:
        return self._same_shape(fqn, self.parameters[fqn], shape)

    def entry(self, fqn: str, name: str, shape: tuple[int, ...]) -> TensorLayout | None:
        known = self.entries.get((fqn, name))
        if known is None or known.layout is None:
            return None
        if known.layout.global_shape != shape:
            raise LayoutError(
                f"{fqn}: the live optimizer's {name!r} has the shape {known.layout.global_shape}, the saved one {shape}; "
                "this checkpoint belongs to another optimizer"
            )
        return known.layout

    def dtype(self, fqn: str, name: str) -> torch.dtype | None:
        if not name:
            return self.dtypes.get(fqn)
        known = self.entries.get((fqn, name))
        return None if known is None else known.dtype

    def weights(self) -> Sequence[str]:
        return (*self.parameters, *self.untrained, *self.buffers, *sorted(self.extras))

    def weight(self, fqn: str, shape: tuple[int, ...]) -> TensorLayout:
        if fqn in self.extras:
            return replicated(shape)
        layout = self.parameters.get(fqn) or self.untrained.get(fqn) or self.buffers[fqn]
        return self._same_shape(fqn, layout, shape)

    def aliases(self, fqn: str) -> Sequence[str]:
        return self.tied.get(fqn, ())

    def positions(self) -> Sequence[Sequence[str]] | None:
        return self.groups

    def may_lack(self, fqn: str) -> bool:
        return fqn in self.frozen

    @staticmethod
    def _same_shape(fqn: str, layout: TensorLayout, shape: tuple[int, ...]) -> TensorLayout:
        if layout.global_shape != shape:
            raise LayoutError(
                f"{fqn}: the model's parameter has the shape {layout.global_shape}, the saved one {shape}; "
                "this checkpoint belongs to another model"
            )
        return layout
