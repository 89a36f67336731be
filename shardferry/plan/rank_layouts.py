"""Tell what every rank of a group wants of a tensor: worked out from a spec, or told by ranks with live models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from shardferry.layout.mesh import Placement, Replicate
from shardferry.layout.mesh_boxes import MeshBoxes, ranks_within
from shardferry.layout.spec import SpecLayout
from shardferry.layout.tensor_layout import NumberedLayouts, RankLayout, TensorLayout, replicated
from shardferry.plan.load_plan import LoadPlan, PlannedTensor
from shardferry.region import Region

Want = tuple[int, TensorLayout]  # world rank, and how the tensor lies there


class Wants(Protocol):
    """What the ranks of a node want."""

    def of(self, tensor: PlannedTensor, region: Region) -> tuple[Want, ...]:
        """The ranks that want something of a box of a tensor, ascending, each with its layout.

        Whoever wants the same of tensors that are cut alike is given as the same object, which is kept.
        """

    def layout(self, tensor: PlannedTensor, world_rank: int) -> TensorLayout | None:
        """How a tensor lies on one of the ranks; None for another rank, and where it has nothing of it."""

    def words(self) -> object:
        """All that they are made of, in values that JSON takes: equal words, equal wants of equal tensors."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """Tensors that are cut alike, and what was found for them."""

    boxes: MeshBoxes
    known: dict[Region, tuple[Want, ...]] = field(default_factory=dict)


class SpecWants:
    """By a spec every rank knows every other's layouts. Tensors that are cut alike are worked out once.

    What it costs does not grow with the number of ranks that a spec has, but for one array operation for each kind of tensor.
    """

    def __init__(self, spec: SpecLayout, world_ranks: Sequence[int]) -> None:
        self._spec = spec
        self._world_ranks = np.array(sorted(world_ranks), dtype=np.int64)
        self._members = frozenset(world_ranks)
        self._ranks: dict[int, RankLayout] = {}
        self._kinds: dict[tuple[object, ...], _Kind] = {}
        self._kind_of: dict[str, _Kind] = {}  # by key

    def of(self, tensor: PlannedTensor, region: Region) -> tuple[Want, ...]:
        kind = self._kind_of.get(tensor.key)
        if kind is None:
            kind = self._kind_of[tensor.key] = self._kind(tensor)
        wants = kind.known.get(region)
        if wants is None:
            ranks = map(self._rank, kind.boxes.holders(region))
            wants = kind.known[region] = tuple((rank.world_rank, self._layout(rank, tensor)) for rank in ranks)
        return wants

    def layout(self, tensor: PlannedTensor, world_rank: int) -> TensorLayout | None:
        if world_rank not in self._members or not self._rank(world_rank).holds(tensor.fqn):
            return None
        return self._layout(self._rank(world_rank), tensor)

    def words(self) -> object:
        return [self._spec.words(), self._world_ranks.tolist()]

    def _kind(self, tensor: PlannedTensor) -> _Kind:
        shape, placements = tensor.layout.global_shape, self._placements(tensor)
        kept_to = self._spec.kept_to(tensor.fqn)
        alike = (shape, placements, tensor.section, tensor.sharded_like_param, kept_to)
        if alike not in self._kinds:
            ranks = ranks_within(self._spec.mesh, self._world_ranks, kept_to)
            self._kinds[alike] = _Kind(MeshBoxes(shape, self._spec.mesh, placements, ranks))
        return self._kinds[alike]

    def _rank(self, world_rank: int) -> RankLayout:
        if world_rank not in self._ranks:
            self._ranks[world_rank] = self._spec.rank(world_rank)
        return self._ranks[world_rank]

    def _placements(self, tensor: PlannedTensor) -> tuple[Placement, ...]:
        """As `_layout` has them."""
        everywhere = (Replicate(),) * len(self._spec.mesh.axes)
        as_parameter = self._spec.placements(tensor.fqn)
        assert as_parameter is not None
        if tensor.section == "model":
            return as_parameter if tensor.layout.global_shape else everywhere
        return self._spec.placements(tensor.fqn, tensor.name) or (
            as_parameter if tensor.sharded_like_param else everywhere
        )

    @staticmethod
    def _layout(rank: RankLayout, tensor: PlannedTensor) -> TensorLayout:
        shape = tensor.layout.global_shape
        if tensor.section == "model":
            return rank.weight(tensor.fqn, shape)
        own = rank.entry(tensor.fqn, tensor.name, shape)
        if own is not None:
            return own
        return rank.parameter(tensor.fqn, shape) if tensor.sharded_like_param else replicated(shape)


@dataclass(frozen=True)
class ToldWants:
    """Live layouts are known to their own rank alone: ranks tell each other, by the checkpoint's key."""

    by_rank: Mapping[int, Mapping[str, TensorLayout]]
    _known: dict[tuple[object, ...], tuple[Want, ...]] = field(default_factory=dict, init=False, repr=False)

    def of(self, tensor: PlannedTensor, region: Region) -> tuple[Want, ...]:
        told = [(rank, layouts[tensor.key]) for rank, layouts in sorted(self.by_rank.items()) if tensor.key in layouts]
        alike = (region, *((rank, id(layout)) for rank, layout in told))
        wants = self._known.get(alike)
        if wants is None:
            wants = self._known[alike] = tuple((rank, layout) for rank, layout in told if _wants(layout, region))
        return wants

    def layout(self, tensor: PlannedTensor, world_rank: int) -> TensorLayout | None:
        return self.by_rank.get(world_rank, {}).get(tensor.key)

    def words(self) -> object:
        keys: dict[tuple[str, ...], int] = {}  # most ranks have the same
        layouts = NumberedLayouts()
        told = [
            (rank, keys.setdefault(tuple(here), len(keys)), list(map(layouts.number, here.values())))
            for rank, here in sorted(self.by_rank.items())
        ]
        return [told, list(keys), layouts.words()]


def _wants(layout: TensorLayout, region: Region) -> bool:
    return any(region.intersect(box.region) is not None for box in layout.boxes)


def told(plan: LoadPlan) -> dict[str, TensorLayout]:
    """What one rank tells the others. Equal layouts of a plan are one object, and so travel once."""
    return {tensor.key: tensor.layout for tensor in plan.tensors}
