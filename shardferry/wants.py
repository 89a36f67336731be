"""Tell what every rank of a group wants of a tensor: worked out from a spec, or told by ranks with live models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from shardferry.layout import RankLayout, TensorLayout, replicated
from shardferry.plan import LoadPlan, PlannedTensor
from shardferry.spec_layout import SpecLayout

Want = tuple[int, TensorLayout]  # world rank, and how the tensor lies there


class Wants(Protocol):
    """What the ranks of a node want."""

    def of(self, tensor: PlannedTensor) -> tuple[Want, ...]:
        """The ranks that want something of a tensor, ascending, each with its layout. Tensors that are cut alike give the same object."""


class SpecWants:
    """By a spec every rank knows every other's layouts. Tensors that are cut alike are worked out once."""

    def __init__(self, spec: SpecLayout, world_ranks: Sequence[int]) -> None:
        self._spec = spec
        self._world_ranks = tuple(world_ranks)
        self._ranks = [spec.rank(rank) for rank in world_ranks]
        self._known: dict[tuple[object, ...], tuple[Want, ...]] = {}

    def of(self, tensor: PlannedTensor) -> tuple[Want, ...]:
        shape = tensor.layout.global_shape
        holders = self._holders(tensor.fqn)
        own = None if tensor.section == "model" else self._spec.placements(tensor.fqn, tensor.name)
        alike = (shape, tensor.as_parameter, tensor.section, own, self._spec.placements(tensor.fqn), holders)
        wants = self._known.get(alike)
        if wants is None:
            layouts = [
                (rank.world_rank, self._layout(rank, tensor)) for rank in self._ranks if rank.world_rank in holders
            ]
            wants = self._known[alike] = tuple(layouts)
        return wants

    def _holders(self, fqn: str) -> tuple[int, ...]:
        if not self._spec.held_by:
            return self._world_ranks
        return tuple(rank.world_rank for rank in self._ranks if rank.holds(fqn))

    @staticmethod
    def _layout(rank: RankLayout, tensor: PlannedTensor) -> TensorLayout:
        shape = tensor.layout.global_shape
        if tensor.section == "model":
            return rank.weight(tensor.fqn, shape)
        own = rank.entry(tensor.fqn, tensor.name, shape)
        if own is not None:
            return own
        return rank.parameter(tensor.fqn, shape) if tensor.as_parameter else replicated(shape)


@dataclass(frozen=True)
class ToldWants:
    """Live layouts are known to their own rank alone: ranks tell each other, by the checkpoint's key."""

    by_rank: Mapping[int, Mapping[str, TensorLayout]]
    _known: dict[tuple[tuple[int, int], ...], tuple[Want, ...]] = field(default_factory=dict, init=False, repr=False)

    def of(self, tensor: PlannedTensor) -> tuple[Want, ...]:
        ranks = sorted(self.by_rank)
        wants = [(rank, layout) for rank in ranks if (layout := self.by_rank[rank].get(tensor.key)) is not None]
        return self._known.setdefault(tuple((rank, id(layout)) for rank, layout in wants), tuple(wants))


def told(plan: LoadPlan) -> dict[str, TensorLayout]:
    """What one rank tells the others. Equal layouts are one object, and so travel once."""
    return {tensor.key: tensor.layout for tensor in plan.tensors}
