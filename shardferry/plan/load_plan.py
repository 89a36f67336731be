"""The nouns of a load: the plan of one rank, and the manifest of the arena that the plan fills.

All of it is plain data: integers, names, layouts and saved Python values. `planner.py` makes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch

from shardferry.config import LoadRequest
from shardferry.layout.mesh import Mesh
from shardferry.layout.tensor_layout import TensorLayout
from shardferry.region import BoxCopy
from shardferry.state_dicts import KeyPath, ParamGroup

Section = Literal["state", "model"]  # the optimizer's state, or the model's weights and buffers


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor in a rank's arena: an entry of a parameter's state, or a parameter or buffer itself."""

    key: str  # in the checkpoint
    fqn: str
    path: KeyPath  # of the state entry below its parameter: ("exp_avg",); empty for weights
    dtype: torch.dtype  # as saved, and in the arena
    layout: TensorLayout
    arena_offset: int  # bytes
    section: Section = "state"
    cast: torch.dtype | None = None  # the dtype that the trainer wants, where it is another one
    sharded_like_param: bool = True  # same shape and placements as its parameter
    # Of a class of its own: the saved chunk that it is, a row of the catalog, and the tensor once it is read. Not in the arena.
    chunk: int | None = None
    value: torch.Tensor | None = None

    @property
    def name(self) -> str:
        """Name of the state entry, dotted where it was nested: ``exp_avg``; empty for weights."""
        return dotted(self.path)

    @property
    def is_parts(self) -> bool:
        """Whether ranks hold parts of it."""
        return self.sharded_like_param or self.layout.local_numel != math.prod(self.layout.global_shape)

    @property
    def nbytes(self) -> int:
        """Size of the local tensor in the arena, bytes."""
        return 0 if self.chunk is not None else self.layout.local_numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class PlannedValue:
    """One Python value that was saved where other savers have a tensor: a ``step`` that is a number, an extra state."""

    key: str  # in the checkpoint
    fqn: str
    path: KeyPath  # of the state entry below its parameter; empty for extra states
    value: Any  # None in a dry run, which reads no values
    section: Section = "state"
    is_parts = False

    @property
    def name(self) -> str:
        """Name of the state entry, dotted where it was nested."""
        return dotted(self.path)


Entry = PlannedTensor | PlannedValue


def dotted(path: KeyPath) -> str:
    """The name of a state entry by its path."""
    return ".".join(map(str, path))


@dataclass(frozen=True, slots=True)
class ReadItem:
    """One copy from a saved chunk to a local tensor."""

    tensor: int  # row of LoadPlan.tensors
    chunk: int  # row of the catalog
    chunk_shape: tuple[int, ...]
    copy: BoxCopy


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """All reads of one rank, and the destination of each."""

    world_rank: int
    world_size: int
    mesh: Mesh | None
    request: LoadRequest
    tensors: tuple[PlannedTensor, ...]
    reads: tuple[ReadItem, ...]
    values: tuple[PlannedValue, ...]
    arena_bytes: int
    objects: Mapping[str, int] = field(
        default_factory=dict
    )  # keys that it reads whole for all ranks; bytes of the items
    fqns: tuple[str, ...] = ()  # parameters that this load is for, with or without state
    missing: tuple[str, ...] = ()  # wanted, not saved, allowed
    param_groups: tuple[ParamGroup, ...] | None = None  # None: they were not read
    # What the optimizer's state dict had beside state and param groups.
    extras: Mapping[str, Any] = field(default_factory=dict)
    # The saved names, the same on all ranks and in the same order, and whether this rank takes each.
    state_keys: Mapping[str, bool] = field(default_factory=dict)
    weight_keys: Mapping[str, bool] = field(default_factory=dict)

    @property
    def bytes_needed(self) -> int:
        """Bytes that this rank wants: its regions of tensors, and whole items of Python objects."""
        tensors = sum(t.layout.wanted_numel * t.dtype.itemsize for t in self.tensors)
        return tensors + sum(self.objects.values())

    def with_values(self, values: Mapping[int, torch.Tensor]) -> LoadPlan:
        """The plan with the tensors of classes of their own that were read, by row."""
        tensors = list(self.tensors)
        for row, value in values.items():
            tensors[row] = replace(tensors[row], value=value)
        return replace(self, tensors=tuple(tensors))

    def manifest(self) -> Manifest:
        """The manifest of the arena that this plan fills."""
        return Manifest(
            world_rank=self.world_rank,
            world_size=self.world_size,
            mesh=self.mesh,
            tensors=self.tensors,
            values=self.values,
            param_groups=self.param_groups or (),
            fqns=self.fqns,
            request=self.request,
            extras=self.extras,
        )


@dataclass(frozen=True)
class Manifest:
    """The contents of one rank's arena, and the saved values that are not tensors. It goes to the trainer with the arena."""

    world_rank: int
    world_size: int
    mesh: Mesh | None
    tensors: tuple[PlannedTensor, ...]
    values: tuple[PlannedValue, ...]
    param_groups: tuple[ParamGroup, ...]
    fqns: tuple[str, ...]  # parameters that the load was for, with or without state
    request: LoadRequest = field(default_factory=LoadRequest)
    extras: Mapping[str, Any] = field(default_factory=dict)

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
        """Parameters that the load was for, with or without state."""
        return frozenset(self.fqns)

    @cached_property
    def grouped(self) -> frozenset[str]:
        """FQNs in the saved param groups."""
        return frozenset(fqn for group in self.param_groups for fqn in group.get("params", ()))
