"""Install loaded state into a live model and its optimizers: state tensors and hyperparameters by FQN, weights in place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Replicate as TorchReplicate

from shardferry.checkpoint.optimizer_state import SCALAR_STATE
from shardferry.errors import InstallError
from shardferry.layout.from_tensor import dtensor_placements, layout_of_tensor
from shardferry.layout.tensor_layout import TensorLayout
from shardferry.optimizer.live import LiveGroup, LiveModel, LiveParameter, Part
from shardferry.optimizer.loaded_state import LoadedState
from shardferry.plan.load_plan import Entry, PlannedTensor, PlannedValue
from shardferry.state_dicts import ParamGroup, nest


def load_into(loaded: LoadedState, live: LiveModel) -> None:
    """Replace the optimizers' state and hyperparameters by loaded ones, and the weights where they were loaded too.

    State on the device of its parameter is used as it is, without a copy; other state is copied to that device. Everything is
    checked before anything is replaced. Parameters that the load was not for (missing and allowed, or not selected) keep
    their state.

    Raises:
        InstallError: the state was loaded for other regions than the model's parameters hold, or lacks one of them.
        LayoutError: the layout of a parameter is not supported.
    """
    fit(loaded, live)()


def fit(loaded: LoadedState, live: LiveModel) -> Callable[[], None]:
    """Check everything that `load_into` checks, and return the function that replaces.

    Several ranks call that function once all of them have checked, so that either all are changed or none.

    Raises:
        InstallError, LayoutError: as `load_into`.
    """
    updates = [_group_update(loaded, group) for group in live.groups]
    copies = _WeightCopies(loaded, live).prepare() if loaded.has_weights else []

    def install() -> None:
        for update in updates:
            update.apply()
        for optimizer in live.optimizers:
            # torch's own load_state_dict ends with this call: optimizers fill in defaults of older checkpoints here.
            optimizer.__setstate__({"state": optimizer.state, "param_groups": optimizer.param_groups})
        with torch.no_grad():
            for copy_weight in copies:
                copy_weight()

    return install


@dataclass(frozen=True, slots=True)
class _GroupUpdate:
    """New hyperparameters and state of one param group."""

    live: LiveGroup
    hyperparameters: Mapping[str, Any]
    state: Sequence[tuple[torch.Tensor, dict[str, Any]]]  # of each parameter that the load is for

    def apply(self) -> None:
        self.live.group.update(self.hyperparameters)
        for tensor, entries in self.state:
            self.live.optimizer.state.pop(tensor, None)
            if entries:
                self.live.optimizer.state[tensor] = entries


def _group_update(loaded: LoadedState, live: LiveGroup) -> _GroupUpdate:
    parameters = [parameter for parameter in live.parameters if _is_covered(loaded, parameter)]
    saved = [_saved_name(loaded, part) for parameter in parameters for part in parameter.parts]
    values = hyperparameters_for(saved, loaded.param_groups) if loaded.param_groups and saved else {}
    new = {**live.group, **values}
    builder = _StateBuilder(loaded, scalars_on_device=bool(new.get("fused") or new.get("capturable")))
    return _GroupUpdate(live, copy.deepcopy(values), [(p.tensor, builder.state_of(p)) for p in parameters])


def _is_covered(loaded: LoadedState, parameter: LiveParameter) -> bool:
    """Whether the load was for this parameter.

    Raises:
        InstallError: it was not, but should have been; or it was for some of the parameters in a flat one only.
    """
    covered = [any(name in loaded.covered for name in part.names) for part in parameter.parts]
    if all(covered):
        return True
    lacking = next(part.fqn for part, there in zip(parameter.parts, covered, strict=True) if not there)
    if any(covered):
        raise InstallError(
            f"{lacking}: is not in the shard, but other parameters of its flat parameter are; FSDP1 steps them as one. "
            "Load all of them or none, or wrap with use_orig_params=True"
        )
    if parameter.tensor.requires_grad and not loaded.may_lack(lacking):
        raise InstallError(
            f"{lacking}: the shard has no state for this parameter; it has {len(loaded.covered)} others. Load with the trainer's "
            "own topology, or with keys: allow_missing"
        )
    return False


def _saved_name(loaded: LoadedState, part: Part) -> str:
    """The parameter's name in the saved param groups: its FQN, or another name of a tied parameter."""
    return next((name for name in part.names if name in loaded.grouped), part.fqn)


def hyperparameters_for(fqns: Sequence[str], saved: Sequence[ParamGroup]) -> dict[str, Any]:
    """The saved hyperparameters for the parameters of one live param group.

    Args:
        fqns: of the parameters.
        saved: the saved param groups.

    Raises:
        InstallError: a parameter is in no saved group, or the parameters come from groups that differ.
    """
    owners = {fqn: index for index, group in enumerate(saved) for fqn in group.get("params", ())}
    missing = [fqn for fqn in fqns if fqn not in owners]
    if missing:
        raise InstallError(
            f"{missing[0]}: in none of the {len(saved)} saved param groups ({len(missing)} of the live group's {len(fqns)} "
            "parameters are missing there); the checkpoint was saved for another model"
        )
    found = [_without_params(saved[index]) for index in sorted({owners[fqn] for fqn in fqns})]
    for other in found[1:]:
        differing = sorted(name for name in {*found[0], *other} if not _same(found[0].get(name), other.get(name)))
        if differing:
            name = differing[0]
            raise InstallError(
                f"one live param group joins saved groups that differ in {name!r} "
                f"({found[0].get(name)!r} and {other.get(name)!r}); split the live group as it was saved"
            )
    return found[0] if found else {}


def _without_params(group: ParamGroup) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in ("params", "param_names")}


def _same(one: Any, other: Any) -> bool:
    return bool(type(one) is type(other) and one == other)


@dataclass(frozen=True, slots=True)
class _StateBuilder:
    """Builds the state of parameters in the form that their optimizer wants."""

    loaded: LoadedState
    scalars_on_device: bool  # fused and capturable optimizers keep ``step`` on the device

    def state_of(self, parameter: LiveParameter) -> dict[str, Any]:
        """All entries of one parameter, nested as they were saved."""
        if not parameter.has_state:
            return {}
        found: dict[str, list[tuple[Part, Entry]]] = {}
        for part in parameter.parts:
            for name, entry in self.loaded.entries(*part.names).items():
                found.setdefault(name, []).append((part, entry))
        entries = {pairs[0][1].path: self._value(parameter, name, pairs) for name, pairs in sorted(found.items())}
        nested: dict[str, Any] = nest(entries)
        return nested

    def _value(self, parameter: LiveParameter, name: str, found: list[tuple[Part, Entry]]) -> Any:
        _, first = found[0]
        existing = parameter.state.get(name)
        if isinstance(first, PlannedValue):
            return _converted(copy.deepcopy(first.value), existing)
        if name in SCALAR_STATE or not first.layout.global_shape:
            return _converted(self._scalar(parameter, name, first), existing)
        if not first.sharded_like_param:
            return self._factor(parameter, first, existing)
        return self._moment(parameter, name, found)

    def _scalar(self, parameter: LiveParameter, name: str, tensor: PlannedTensor) -> torch.Tensor:
        """``step`` stays on the CPU, where optimizers that are not fused or capturable want it."""
        value = self.loaded.local_tensor(tensor)
        on_cpu = name in SCALAR_STATE and not self.scalars_on_device
        return value if on_cpu else value.to(parameter.local.device)

    def _factor(self, parameter: LiveParameter, tensor: PlannedTensor, existing: Any) -> torch.Tensor:
        """State with a layout of its own. Beside a DTensor it must be a DTensor: torch doesn't compute with a mix of them."""
        local, live = self.loaded.local_tensor(tensor).to(parameter.local.device), parameter.tensor
        if isinstance(existing, DTensor):
            return _like(local, existing)
        if existing is not None or not isinstance(live, DTensor):
            return local
        mesh, shape = live.device_mesh, tensor.layout.global_shape
        placed = tensor.layout.placements is not None and len(tensor.layout.placements) == mesh.ndim
        placements = dtensor_placements(tensor.layout, mesh) if placed else [TorchReplicate()] * mesh.ndim
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)

    def _moment(self, parameter: LiveParameter, name: str, found: list[tuple[Part, Entry]]) -> torch.Tensor:
        """State with the shape and the layout of its parameter."""
        existing = parameter.state.get(name)
        pieces = self._pieces(parameter, name, found)
        (part, tensor), live = pieces[0], parameter.local
        if len(pieces) == 1 and part.position == 0 and part.layout.local_numel == live.numel():
            local = self.loaded.local_tensor(tensor).to(live.device)
        else:
            local = self._concatenated(live, pieces)
        local = local.view(live.shape)
        wants_local = isinstance(existing, torch.Tensor) and existing.ndim and not isinstance(existing, DTensor)
        return local if wants_local else _like(local, parameter.tensor)

    def _pieces(
        self, parameter: LiveParameter, name: str, found: list[tuple[Part, Entry]]
    ) -> list[tuple[Part, PlannedTensor]]:
        """The state of all parameters in a tensor. Raises InstallError: one lacks it, or was loaded for other regions."""
        if len(found) < len(parameter.parts):
            lacking = next(p.fqn for p in parameter.parts if p not in [there for there, _ in found])
            raise InstallError(f"{lacking}: has no {name!r}, which the other parameters of its flat parameter have")
        return [(part, _checked_tensor(part, entry)) for part, entry in found]

    def _concatenated(self, live: torch.Tensor, pieces: list[tuple[Part, PlannedTensor]]) -> torch.Tensor:
        """The state of a flat parameter, from the slices of the parameters in it; its padding stays zero."""
        sources = [(part, self.loaded.local_tensor(tensor)) for part, tensor in pieces]
        flat = torch.zeros(live.numel(), dtype=sources[0][1].dtype, device=live.device)
        for part, source in sources:
            flat[part.position : part.position + source.numel()].copy_(source.view(-1))
        return flat


def _converted(value: Any, existing: Any) -> Any:
    """A number as a tensor, or a tensor as a number, where the live optimizer has it so."""
    if isinstance(existing, torch.Tensor) and not isinstance(value, torch.Tensor):
        return value if value is None else torch.full_like(existing, value)
    if isinstance(existing, torch.Tensor) and value.numel() == existing.numel():
        return value.view(existing.shape)
    if isinstance(existing, int | float) and isinstance(value, torch.Tensor) and value.numel() == 1:
        return type(existing)(value.item())
    return value


def _like(local: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """A local tensor as a DTensor with the mesh, placements and shape of another one; as it is beside a plain tensor."""
    if not isinstance(live, DTensor):
        return local
    return DTensor.from_local(
        local, live.device_mesh, live.placements, run_check=False, shape=live.shape, stride=live.stride()
    )


def _checked_tensor(part: Part, entry: Entry) -> PlannedTensor:
    """The entry, proven to hold the same regions as the live tensor.

    Raises:
        InstallError: it holds others, or was not saved as a tensor.
    """
    if isinstance(entry, PlannedValue):
        raise InstallError(f"{entry.fqn}: {entry.name!r} was saved as a {type(entry.value).__name__}, not as a tensor")
    wanted, loaded = part.layout, entry.layout
    if not _holds_the_same(wanted, loaded):
        what = repr(entry.name) if entry.name else "the weight"
        raise InstallError(
            f"{entry.fqn}: {what} was loaded for {_regions(loaded)}, but the model's parameter holds {_regions(wanted)} of the "
            f"shape {wanted.global_shape} on this rank; load with the trainer's own topology"
        )
    return entry


def _holds_the_same(one: TensorLayout, other: TensorLayout) -> bool:
    return (one.global_shape, one.local_numel, one.boxes) == (other.global_shape, other.local_numel, other.boxes)


def _regions(layout: TensorLayout) -> str:
    return " and ".join(str(box.region) for box in layout.boxes) or "nothing"


@dataclass(frozen=True, slots=True)
class _WeightCopies:
    """Finds the live tensor that each loaded weight goes to."""

    loaded: LoadedState
    live: LiveModel

    def prepare(self) -> list[Callable[[], None]]:
        """The copies to make once everything is checked. Raises InstallError."""
        parts = [(part, p.local) for p in self.live.parameters for part in p.parts if part.layout.local_numel]
        buffers = [(Part(fqn, layout_of_tensor(buffer, name=fqn)), buffer) for fqn, buffer in self.live.buffers.items()]
        found = (self._copy(part, local) for part, local in (*parts, *buffers))
        copies = [copy_weight for copy_weight in found if copy_weight is not None]
        for fqn, module in self.live.extra_states.items():
            if (entry := self.loaded.weight(fqn)) is not None:
                copies.append(_setter(module, self.loaded.value_of(entry)))
        return copies

    def _copy(self, part: Part, local: torch.Tensor) -> Callable[[], None] | None:
        """The copy of one weight; None where it was not loaded, and may be missing."""
        entry = self.loaded.weight(*part.names)
        if entry is None:
            if self.loaded.may_lack(part.fqn):
                return None
            raise InstallError(f"{part.fqn}: the shard has no weights of this name; set keys: allow_missing to go on")
        source = self.loaded.local_tensor(_checked_tensor(part, entry))
        memory = local.to_local() if isinstance(local, DTensor) else local

        def copy_slice() -> None:
            destination = memory.detach().view(-1)[part.position : part.position + source.numel()]
            destination.copy_(source.reshape(-1))

        def copy_whole() -> None:
            memory.detach().copy_(source.view(memory.shape))

        return copy_slice if source.numel() < memory.numel() else copy_whole


def _setter(module: torch.nn.Module, value: Any) -> Callable[[], None]:
    return lambda: module.set_extra_state(value)
