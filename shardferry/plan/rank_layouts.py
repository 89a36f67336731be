"""Know how a tensor is laid out on every rank that reads with this one: from a spec, or from what live ranks exchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch.distributed.tensor import Replicate

from shardferry.layout.rank_layout import RankLayout
from shardferry.layout.spec import MeshBoxes, SpecLayout, ranks_at
from shardferry.layout.tensor_layout import TensorLayout, replicated
from shardferry.plan.load_plan import LoadPlan, PlannedTensor
from shardferry.plan.split import RankAndLayout
from shardferry.region import Region


@dataclass(frozen=True, slots=True)
class _Kind:
    """Tensors with the same boxes on every rank, and the holders found so far."""

    boxes: MeshBoxes
    known: dict[Region, tuple[RankAndLayout, ...]] = field(default_factory=dict)


class LayoutsFromSpec:
    """A spec gives every rank's layouts. Tensors with the same boxes are worked out once.

    The cost doesn't grow with the number of ranks, but for one array operation per kind of tensor.
    """

    def __init__(self, spec: SpecLayout, world_ranks: Sequence[int]) -> None:
        self._spec = spec
        self._world_ranks = np.array(sorted(world_ranks), dtype=np.int64)
        self._members = frozenset(world_ranks)
        self._ranks: dict[int, RankLayout] = {}
        self._kinds: dict[tuple[object, ...], _Kind] = {}
        self._kind_of: dict[str, _Kind] = {}  # by key

    def holders(self, tensor: PlannedTensor, region: Region) -> tuple[RankAndLayout, ...]:
        kind = self._kind_of.get(tensor.key)
        if kind is None:
            kind = self._kind_of[tensor.key] = self._kind(tensor)
        found = kind.known.get(region)
        if found is None:
            ranks = map(self._rank, kind.boxes.holders(region))
            found = kind.known[region] = tuple((rank.world_rank, self._layout(rank, tensor)) for rank in ranks)
        return found

    def _kind(self, tensor: PlannedTensor) -> _Kind:
        shape = tensor.layout.global_shape
        placements = tensor.layout.placements or (Replicate(),) * len(self._spec.mesh.axes)
        kept_to = self._spec.holder_coordinates(tensor.fqn)
        same = (shape, placements, tensor.section, tensor.sharded_like_param, kept_to)
        if same not in self._kinds:
            ranks = ranks_at(self._spec.mesh, self._world_ranks, kept_to)
            self._kinds[same] = _Kind(MeshBoxes(shape, self._spec.mesh, placements, ranks))
        return self._kinds[same]

    def _rank(self, world_rank: int) -> RankLayout:
        if world_rank not in self._ranks:
            self._ranks[world_rank] = self._spec.rank(world_rank)
        return self._ranks[world_rank]

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
class ExchangedLayouts:
    """The layouts of live models, which each rank knows only of itself: ranks send them to each other, by checkpoint key."""

    by_rank: Mapping[int, Mapping[str, TensorLayout]]
    _known: dict[tuple[object, ...], tuple[RankAndLayout, ...]] = field(default_factory=dict, init=False, repr=False)

    def holders(self, tensor: PlannedTensor, region: Region) -> tuple[RankAndLayout, ...]:
        sent = [(rank, layouts[tensor.key]) for rank, layouts in sorted(self.by_rank.items()) if tensor.key in layouts]
        same = (region, *((rank, id(layout)) for rank, layout in sent))
        found = self._known.get(same)
        if found is None:
            found = self._known[same] = tuple((rank, layout) for rank, layout in sent if _holds(layout, region))
        return found


def _holds(layout: TensorLayout, region: Region) -> bool:
    return any(region.intersect(box.region) is not None for box in layout.boxes)


def layouts_to_send(plan: LoadPlan) -> dict[str, TensorLayout]:
    """The layouts that one rank sends to the others, by key. Equal layouts of a plan are one object, and are sent once."""
    return {tensor.key: tensor.layout for tensor in plan.tensors}
