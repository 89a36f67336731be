"""The layout of a rank whose model is live: one layout per parameter, state entry and buffer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from shardferry.errors import LayoutError
from shardferry.layout.mesh import Mesh
from shardferry.layout.rank_layout import RankLayout
from shardferry.layout.tensor_layout import TensorLayout, replicated


@dataclass(frozen=True, slots=True)
class LiveEntry:
    """One state entry that a live optimizer has, or will have after a step."""

    layout: TensorLayout | None  # None: as its parameter
    dtype: torch.dtype
    is_predicted: bool = False


@dataclass(frozen=True)
class LiveLayout(RankLayout):
    """What the live model of one rank holds. The layouts of other ranks are not known."""

    world_rank: int
    world_size: int
    parameters: Mapping[str, TensorLayout]  # by FQN: those that the optimizer trains
    mesh: Mesh | None = None
    entries: Mapping[tuple[str, str], LiveEntry] = field(default_factory=dict)  # by FQN and state name
    tied: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # FQN: the parameter's other FQNs
    frozen: frozenset[str] = frozenset()
    groups: tuple[tuple[str, ...], ...] | None = None  # FQNs of each param group; None: flat parameters have no order
    buffers: Mapping[str, TensorLayout] = field(default_factory=dict)  # by FQN
    untrained: Mapping[str, TensorLayout] = field(default_factory=dict)  # by FQN: parameters of no optimizer
    extras: frozenset[str] = frozenset()  # FQNs of modules' extra states
    own_weights: Mapping[str, TensorLayout] = field(default_factory=dict)  # by FQN: as modules' own code saves them
    within_own: frozenset[str] = frozenset()  # FQNs of the parameters, buffers and extra states of these modules
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)  # by FQN, of parameters and buffers

    def fqns(self) -> Sequence[str]:
        return tuple(self.parameters)

    def holds(self, fqn: str) -> bool:
        return fqn in self.parameters

    def parameter_shape(self, fqn: str) -> tuple[int, ...] | None:
        layout = self.parameters.get(fqn)
        return None if layout is None else layout.global_shape

    def parameter(self, fqn: str, shape: tuple[int, ...]) -> TensorLayout:
        return _same_shape(self.parameters[fqn], shape, f"{fqn}: the model's parameter", "model")

    def entry(self, fqn: str, name: str, shape: tuple[int, ...]) -> TensorLayout | None:
        known = self.entries.get((fqn, name))  # none for an entry that doesn't exist yet
        if known is None:
            return None
        if known.layout is None:
            _same_shape(self.parameters[fqn], shape, f"{fqn}: the model's parameter", "model")
            return None
        if known.is_predicted and known.layout.global_shape != shape:  # it may change as the optimizer goes on
            return None
        return _same_shape(known.layout, shape, f"{fqn}: the live optimizer's {name!r}", "optimizer")

    def dtype(self, fqn: str, name: str) -> torch.dtype | None:
        if not name:
            return self.dtypes.get(fqn)
        known = self.entries.get((fqn, name))
        return None if known is None else known.dtype

    def weights(self) -> Sequence[str]:
        names = (*self.parameters, *self.untrained, *self.buffers, *sorted(self.extras))
        return (*(name for name in names if name not in self.within_own), *self.own_weights)

    def weight(self, fqn: str, shape: tuple[int, ...]) -> TensorLayout:
        if fqn in self.extras:
            return replicated(shape)  # whole on every rank
        fqn = self._owners.get(fqn, fqn)
        layout = self.own_weights.get(fqn) or self.parameters.get(fqn) or self.untrained.get(fqn) or self.buffers[fqn]
        return _same_shape(layout, shape, f"{fqn}: the model's parameter", "model")

    @cached_property
    def _owners(self) -> dict[str, str]:
        """The first FQN of each tied parameter, by its other ones."""
        return {alias: fqn for fqn, aliases in self.tied.items() for alias in aliases}

    def aliases(self, fqn: str) -> Sequence[str]:
        return self.tied.get(fqn, ())

    def positions(self) -> Sequence[Sequence[str]] | None:
        return self.groups

    def may_lack(self, fqn: str) -> bool:
        return fqn in self.frozen


def _same_shape(layout: TensorLayout, shape: tuple[int, ...], what: str, owner: str) -> TensorLayout:
    if layout.global_shape != shape:
        raise LayoutError(
            f"{what} has the shape {layout.global_shape}, the saved one {shape}; this checkpoint belongs to another {owner}"
        )
    return layout
