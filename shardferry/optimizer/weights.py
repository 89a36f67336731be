"""Load weights, buffers and extra states into live modules: in place, or through the modules' own code where they have some."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn import Module

from shardferry.errors import InstallError
from shardferry.layout.from_tensor import layout_of_tensor
from shardferry.layout.tensor_layout import TensorLayout
from shardferry.optimizer.live import LiveModel, Part
from shardferry.optimizer.loaded_state import LoadedState, checked_tensor
from shardferry.optimizer.module_form import ModuleForm, has_own_code_in_fsdp1


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
        self._before = [(t, t.detach().clone()) for t in (*self.root.parameters(), *self.root.buffers())]
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


def weight_steps(loaded: LoadedState, live: LiveModel) -> list[WeightStep]:
    """What to do once everything is checked.

    Raises:
        InstallError: a weight is missing and must not be, was loaded for other regions than the live one holds, or belongs to
            a module whose own code can't be run.
    """
    for root in live.modules:
        if has_own_code_in_fsdp1(root):
            raise InstallError(
                f"{type(root).__name__}: its own hooks take part in its state dict, and FSDP1 has flattened it; its weights "
                "can't be loaded rank by rank. Use FSDP2 (fully_shard), or load the optimizer alone"
            )
    within = {name for form in live.own_forms for name in form.replaced}
    return [*_in_place(loaded, live, within), *(_through_module(loaded, form) for form in live.own_forms)]


def _in_place(loaded: LoadedState, live: LiveModel, within: set[str]) -> Iterator[WeightStep]:
    parts = [(part, p.local) for p in live.parameters for part in p.parts if part.layout.local_numel]
    buffers = [(Part(fqn, layout_of_tensor(buffer, name=fqn)), buffer) for fqn, buffer in live.buffers.items()]
    for part, local in (*parts, *buffers):
        if part.fqn not in within:
            source = _loaded_weight(loaded, part.names, part.layout)
            _check_tied(loaded, part, source)
            if source is not None:
                yield CopyInPlace(source, local.to_local() if isinstance(local, DTensor) else local, part.position)
    for fqn, module in live.extra_states.items():
        if fqn not in within and (entry := loaded.weight(fqn)) is not None:
            yield SetExtraState(module, loaded.value_of(entry))


def _check_tied(loaded: LoadedState, part: Part, source: torch.Tensor | None) -> None:
    """Refuse values that differ for one parameter. Raises InstallError."""
    for name in part.aliases:
        other = loaded.weight(name)
        if source is None or other is None:
            continue
        if not torch.equal(loaded.local_tensor(checked_tensor(name, other, part.layout)).to(source.dtype), source):
            raise InstallError(
                f"{part.fqn} and {name} are one (tied) parameter here, and the checkpoint has different weights for them; "
                "give the model untied, as it was saved, or exclude one of the two"
            )


def _loaded_weight(loaded: LoadedState, names: tuple[str, ...], layout: TensorLayout) -> torch.Tensor | None:
    """The local tensor; None where it was not loaded, and may be missing. Raises InstallError."""
    entry = loaded.weight(*names)
    if entry is None:
        if loaded.may_lack(names[0]):
            return None
        raise InstallError(f"{names[0]}: the shard has no weights of this name; set keys: allow_missing to go on")
    return loaded.local_tensor(checked_tensor(names[0], entry, layout))


def _through_module(loaded: LoadedState, form: ModuleForm) -> LoadModule:
    state_dict: dict[str, Any] = {}
    for fqn, key in form.keys.items():
        live = form.tensors.get(fqn)
        if live is None:
            if (entry := loaded.weight(fqn)) is not None:
                state_dict[key] = loaded.value_of(entry)
            continue
        local = _loaded_weight(loaded, (fqn,), layout_of_tensor(live, name=fqn))
        if local is not None and isinstance(live, DTensor):
            local = DTensor.from_local(
                local, live.device_mesh, live.placements, run_check=False, shape=live.shape, stride=live.stride()
            )
        if local is not None:
            state_dict[key] = local
    return LoadModule(form.root, state_dict)
