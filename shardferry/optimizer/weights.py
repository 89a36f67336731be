"""The ways in which weights, buffers and extra states get into live modules: in place, or through the modules' own code."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import Module

from shardferry.errors import InstallError
from shardferry.optimizer.replace import is_expanded


@dataclass
class CopyInPlace:
    """Loaded elements for a live tensor, or for a part of a flat one."""

    source: torch.Tensor
    memory: torch.Tensor  # local
    position: int = 0  # elements

    def apply(self) -> None:
        """Nothing: a copy can't fail, and can't be undone."""

    def undo(self) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Copy."""
        memory, source = self.memory.detach(), self.source
        if source.numel() < memory.numel():
            memory.view(-1)[self.position : self.position + source.numel()].copy_(source.reshape(-1))
        else:
            memory.copy_(source.view(memory.shape))


@dataclass
class SetExtraState:
    """A module's extra state."""

    module: Module
    value: Any
    _before: list[Any] = field(default_factory=list)

    def apply(self) -> None:
        """Give it to the module. Raises InstallError."""
        self._before.append(copy.deepcopy(self.module.get_extra_state()))
        try:
            self.module.set_extra_state(self.value)
        except Exception as error:
            raise _refused(self.module, "set_extra_state", error) from error

    def undo(self) -> None:
        """Give it the former one."""
        if self._before:
            self.module.set_extra_state(self._before.pop())

    def finish(self) -> None:
        """Nothing is left to do."""


@dataclass
class LoadModule:
    """The weights of a model part with code of its own, through its `load_state_dict`."""

    root: Module
    state_dict: dict[str, Any]
    _before: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def apply(self) -> None:
        """Load. The former weights are kept until the end. Raises InstallError."""
        tensors = (t for t in (*self.root.parameters(), *self.root.buffers()) if not is_expanded(t))
        self._before = [(t, t.detach().clone()) for t in tensors]
        try:
            result = self.root.load_state_dict(self.state_dict, strict=False)
        except Exception as error:
            raise _refused(self.root, "load_state_dict", error) from error
        if result.unexpected_keys:
            raise InstallError(
                f"{result.unexpected_keys[0]}: {type(self.root).__name__}.load_state_dict has no use for it "
                f"({len(result.unexpected_keys)} such keys); the checkpoint is another model's"
            )

    def undo(self) -> None:
        """Put the former weights back."""
        for tensor, elements in self._before:
            tensor.detach().copy_(elements)

    def finish(self) -> None:
        """Forget the former weights."""
        self._before.clear()


WeightStep = CopyInPlace | SetExtraState | LoadModule


def _refused(module: Module, method: str, error: Exception) -> InstallError:
    return InstallError(
        f"{type(module).__name__}.{method} raised {type(error).__name__}: {error}; the model is as it was. The checkpoint is "
        "another model's, or of another version of it"
    )
