"""Say what one rank's arena holds: where each tensor of the loaded state lies, and the values that are no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch

from shardferry.checkpoint.optimizer_state import ParamGroup
from shardferry.config import LoadRequest
from shardferry.layout.mesh import Mesh
from shardferry.layout.tensor_layout import TensorLayout
from shardferry.state_dicts import KeyPath

Section = Literal["state", "model"]


@dataclass(frozen=True, slots=True)
class StateTensor:
    """One tensor in an arena: an entry of a parameter's state, or a parameter or buffer itself."""

    fqn: str
    name: str  # of the state entry, dotted where it was nested; empty for weights
    dtype: torch.dtype  # in the arena
    layout: TensorLayout
    arena_offset: int  # bytes
    section: Section = "state"
    path: KeyPath = ()  # below the parameter, where it was nested
    cast: torch.dtype | None = None  # what it becomes when it is taken out
    as_parameter: bool = True  # it lies as its parameter does

    @property
    def place(self) -> KeyPath:
        return self.path or (self.name,)


@dataclass(frozen=True, slots=True)
class StateValue:
    """A Python value that was saved in the place of a tensor."""

    fqn: str
    place: KeyPath  # below the parameter
    value: Any
    section: Section = "state"

    @property
    def name(self) -> str:
        return ".".join(map(str, self.place))


Entry = StateTensor | StateValue


@dataclass(frozen=True)
class Manifest:
    """What one rank's arena holds."""

    world_rank: int
    world_size: int
    mesh: Mesh | None
    tensors: tuple[StateTensor, ...]
    values: tuple[StateValue, ...]
    param_groups: tuple[ParamGroup, ...]
    fqns: tuple[str, ...]  # parameters that the load was for, with or without state
    request: LoadRequest = field(default_factory=LoadRequest)

    @cached_property
    def by_fqn(self) -> Mapping[str, Mapping[str, Entry]]:
        """State entries by FQN and name."""
        by_fqn: dict[str, dict[str, Entry]] = {}
        for entry in self._entries("state"):
            by_fqn.setdefault(entry.fqn, {})[entry.name] = entry
        return by_fqn

    @cached_property
    def weights(self) -> Mapping[str, Entry]:
        """Parameters, buffers and extra states by FQN."""
        return {entry.fqn: entry for entry in self._entries("model")}

    def _entries(self, section: Section) -> list[Entry]:
        entries: list[Entry] = [*self.values, *self.tensors]
        return [entry for entry in entries if entry.section == section]

    @cached_property
    def covered(self) -> frozenset[str]:
        return frozenset(self.fqns)

    @cached_property
    def grouped(self) -> frozenset[str]:
        """FQNs in the saved param groups."""
        return frozenset(fqn for group in self.param_groups for fqn in group.get("params", ()))
