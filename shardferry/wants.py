"""Tell what every rank of a group wants of a tensor: worked out from a spec, or told by ranks with live models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from shardferry.layout import RankLayout, TensorLayout, replicated
from shardferry.plan import LoadPlan, PlannedTensor
from shardferry.spec_layout import SpecLayout

Want = tuple[int, TensorLayout]  # world rank, and how the tensor lies there


class Wants(Protocol):
    """What the ranks of a node want."""

    def of(self, tensor: PlannedTensor) -> tuple[Want, ...]:
        """The ranks that want something of a tensor, ascending, each with its layout. Equal tensors give the same object."""


class SpecWants:
    """By a spec every rank knows every other's layouts. Tensors that are cut alike are worked out once."""

    def __init__(self, spec: SpecLayout, world_ranks: Sequence[int]) -> None:
        self._spec = spec
        self._ranks = [spec.rank(rank) for rank in world_ranks]
        self._known: dict[tuple[object, ...], tuple[Want, ...]] = {}

    def of(self, tensor: PlannedTensor) -> tuple[Want, ...]:
        shape = tensor.layout.global_shape
        holders = tuple(rank.world_rank for rank in self._ranks if rank.holds(tensor.fqn))
        own = None if tensor.section == "model" else self._spec.placements(tensor.fqn, tensor.name)
        alike = (shape, tensor.as_parameter, tensor.section, own, self._spec.placements(tensor.fqn), holders)
        wants = self._known.get(alike)
        if wants is None:
            layouts = [
                (rank.world_rank, self._layout(rank, tensor)) for rank in self._ranks if rank.world_rank in holders
            ]
            wants = self._known[alike] = tuple(layouts)
        return wants

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

    def of(self, tensor: PlannedTensor) -> tuple[Want, ...]:
        return tuple(
            (rank, layouts[tensor.key]) for rank, layouts in sorted(self.by_rank.items()) if tensor.key in layouts
        )


def told(plan: LoadPlan) -> dict[str, TensorLayout]:
    """What one rank tells the others."""
    return {tensor.key: tensor.layout for tensor in plan.tensors}
