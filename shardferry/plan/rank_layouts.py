"""Know how a tensor is laid out on every rank that reads with this one: from a spec, or from what live ranks exchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter

import numpy as np
from torch.distributed.tensor import Replicate

from shardferry.layout.spec import MeshBoxes, SpecLayout, ranks_at
from shardferry.layout.tensor_layout import TensorLayout, single_box
from shardferry.plan.load_plan import LoadPlan, PlannedTensor
from shardferry.plan.split import RankAndLayout
from shardferry.region import Region


@dataclass(frozen=True, slots=True)
class _Kind:
    """Tensors with the same boxes on every rank, and the holders found so far."""

    boxes: MeshBoxes
    holders: dict[Region, tuple[RankAndLayout, ...]] = field(default_factory=dict)


class LayoutsFromSpec:
    """A spec gives every rank's layouts. Tensors with the same boxes are worked out once.

    The cost doesn't grow with the number of ranks, but for one array operation per kind of tensor.
    """

    def __init__(self, spec: SpecLayout, world_ranks: Sequence[int]) -> None:
        self._spec = spec
        self._world_ranks = np.array(sorted(world_ranks), dtype=np.int64)
        self._kinds: dict[tuple[object, ...], _Kind] = {}
        self._kind_of: dict[str, _Kind] = {}  # by key

    def holders(self, tensor: PlannedTensor, region: Region) -> tuple[RankAndLayout, ...]:
        kind = self._kind_of.get(tensor.key)
        if kind is None:
            kind = self._kind_of[tensor.key] = self._kind(tensor)
        found = kind.holders.get(region)
        if found is None:
            shape, placements = tensor.layout.global_shape, tensor.layout.placements
            held: list[RankAndLayout] = []
            for box, ranks in kind.boxes.holders(region).items():
                layout = single_box(shape, box, placements)
                held += [(rank, layout) for rank in ranks]
            found = kind.holders[region] = tuple(sorted(held, key=itemgetter(0)))
        return found

    def _kind(self, tensor: PlannedTensor) -> _Kind:
        mesh, shape, placements = self._spec.mesh, tensor.layout.global_shape, tensor.layout.placements
        held_at = self._spec.holder_coordinates(tensor.fqn)
        same = (shape, placements, held_at)
        if same not in self._kinds:
            ranks = ranks_at(mesh, self._world_ranks, held_at)
            boxes = MeshBoxes(shape, mesh, placements or (Replicate(),) * len(mesh.axes), ranks)
            self._kinds[same] = _Kind(boxes)
        return self._kinds[same]


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
            found = self._known[same] = tuple(
                (rank, layout)
                for rank, layout in sent
                if any(region.intersect(box.region) is not None for box in layout.boxes)
            )
        return found


def layouts_to_send(plan: LoadPlan) -> dict[str, TensorLayout]:
    """The layouts that one rank sends to the others, by key. Equal layouts of a plan are one object, and are sent once."""
    return {tensor.key: tensor.layout for tensor in plan.tensors}
