"""Put loaded state into live optimizers and models: tensors by FQN, hyperparameters by their parameters, weights in place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Replicate as TorchReplicate

from shardferry.checkpoint.optimizer_state import SCALAR_STATE
from shardferry.checkpoint.param_groups import hyperparameters_for
from shardferry.errors import InstallError
from shardferry.layout.from_tensor import layout_of_tensor
from shardferry.layout.placing import torch_placements
from shardferry.layout.tensor_layout import TensorLayout
from shardferry.optimizer.live import LiveGroup, LiveModel, LiveParameter, Part
from shardferry.plan.manifest import Entry, StateTensor, StateValue
from shardferry.state_dicts import nest

if TYPE_CHECKING:
    from shardferry.handoff.handle import Shard


def load_into(shard: Shard, live: LiveModel) -> None:
    """Replace optimizers' state and hyperparameters, and weights where the shard has some, by a shard's.

    State on the shard's own device is used as it is, without a copy; other state is copied to its parameter's device.
    Everything is checked before anything is replaced. What the load was not for (missing and allowed, or not selected) stays.

    Raises:
        InstallError: the shard lies otherwise than the model's parameters, or lacks one of them.
    """
    fit(shard, live)()


def fit(shard: Shard, live: LiveModel) -> Callable[[], None]:
    """Check all that `load_into` checks, and give back the replacing: ranks do it once all of them have checked.

    Raises:
        InstallError: as `load_into`.
    """
    groups = [_prepare(shard, group) for group in live.groups]
    weights = _Weights(shard, live).copies() if shard.has_weights else []

    def install() -> None:
        for prepared in groups:
            prepared.apply()
        for optimizer in live.optimizers:
            # What torch's own load_state_dict ends with: optimizers fill in defaults of older checkpoints here.
            optimizer.__setstate__({"state": optimizer.state, "param_groups": optimizer.param_groups})
        with torch.no_grad():
            for put in weights:
                put()

    return install


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What one param group becomes."""

    live: LiveGroup
    hyperparameters: Mapping[str, Any]
    state: Sequence[tuple[torch.Tensor, dict[str, Any]]]  # of each parameter that the load is for

    def apply(self) -> None:
        self.live.group.update(self.hyperparameters)
        for tensor, entries in self.state:
            self.live.optimizer.state.pop(tensor, None)
            if entries:
                self.live.optimizer.state[tensor] = entries


def _prepare(shard: Shard, live: LiveGroup) -> _Prepared:
    parameters = [parameter for parameter in live.parameters if _is_covered(shard, parameter)]
    saved = [_saved_name(shard, part) for parameter in parameters for part in parameter.parts]
    values = hyperparameters_for(saved, shard.param_groups) if shard.param_groups and saved else {}
    flags = {**live.group, **values}  # as they will be: a fused or capturable optimizer keeps `step` on the device
    installer = _Installer(shard, scalars_on_device=bool(flags.get("fused") or flags.get("capturable")))
    return _Prepared(live, copy.deepcopy(values), [(p.tensor, installer.state_of(p)) for p in parameters])


def _is_covered(shard: Shard, parameter: LiveParameter) -> bool:
    """Whether the load was for this parameter.

    Raises:
        InstallError: it should have been, or it was for some of the parameters in a flat one only.
    """
    covered = [any(name in shard.covered for name in part.names) for part in parameter.parts]
    if all(covered):
        return True
    lacking = next(part.fqn for part, there in zip(parameter.parts, covered, strict=True) if not there)
    if any(covered):
        raise InstallError(
            f"{lacking}: is not in the shard, but other parameters of its flat parameter are; FSDP1 steps them as one. "
            "Load all of them or none, or wrap with use_orig_params=True"
        )
    if parameter.tensor.requires_grad and not shard.may_lack(lacking):
        raise InstallError(
            f"{lacking}: the shard has no state for this parameter; it has {len(shard.covered)} others. Load with the trainer's "
            "own topology, or with keys: allow_missing"
        )
    return False


def _saved_name(shard: Shard, part: Part) -> str:
    """The name under which the param groups have a parameter: its own, or another one of a tied one."""
    return next((name for name in part.names if name in shard.grouped), part.fqn)


@dataclass(frozen=True, slots=True)
class _Installer:
    """Makes the entries of parameters' state as their optimizer wants them."""

    shard: Shard
    scalars_on_device: bool

    def state_of(self, parameter: LiveParameter) -> dict[str, Any]:
        """All entries of one parameter, nested as they were saved."""
        if not parameter.has_state:
            return {}
        found: dict[str, list[tuple[Part, Entry]]] = {}
        for part in parameter.parts:
            for name, entry in self.shard.entries(*part.names).items():
                found.setdefault(name, []).append((part, entry))
        entries = {places[0][1].place: self._value(parameter, name, places) for name, places in sorted(found.items())}
        nested: dict[str, Any] = nest(entries)
        return nested

    def _value(self, parameter: LiveParameter, name: str, found: list[tuple[Part, Entry]]) -> Any:
        part, first = found[0]
        existing = parameter.state.get(name)
        if isinstance(first, StateValue):
            return _as_existing(copy.deepcopy(first.value), existing)
        if name in SCALAR_STATE or not first.layout.global_shape:
            return _as_existing(self._scalar(parameter, name, first), existing)
        if not first.as_parameter:
            return self._factor(parameter, first, existing)
        if len(found) < len(parameter.parts):
            lacking = next(p.fqn for p in parameter.parts if p not in [there for there, _ in found])
            raise InstallError(f"{lacking}: has no {name!r}, which the other parameters of its flat parameter have")
        for place, entry in found:
            _check_same_place(place, entry)
        if len(found) == 1 and part.position == 0 and part.layout.local_numel == parameter.local.numel():
            local = self.shard.local_tensor(first).to(parameter.local.device)
        else:
            local = self._concatenated(parameter, found)
        local = local.view(parameter.local.shape)
        wants_local = isinstance(existing, torch.Tensor) and existing.ndim and not isinstance(existing, DTensor)
        return local if wants_local else _like(local, parameter.tensor)

    def _scalar(self, parameter: LiveParameter, name: str, entry: StateTensor) -> torch.Tensor:
        """``step`` stays on the CPU, where optimizers that aren't fused or capturable want it."""
        value = self.shard.local_tensor(entry)
        on_cpu = name in SCALAR_STATE and not self.scalars_on_device
        return value if on_cpu else value.to(parameter.local.device)

    def _factor(self, parameter: LiveParameter, entry: StateTensor, existing: Any) -> torch.Tensor:
        """State that has another shape than its parameter. Beside a DTensor only a DTensor can be computed with."""
        local, live = self.shard.local_tensor(entry).to(parameter.local.device), parameter.tensor
        if isinstance(existing, DTensor):
            return _like(local, existing)
        if existing is not None or not isinstance(live, DTensor):
            return local
        mesh, shape = live.device_mesh, entry.layout.global_shape
        placed = entry.layout.placements is not None and len(entry.layout.placements) == mesh.ndim
        placements = torch_placements(entry.layout, mesh) if placed else [TorchReplicate()] * mesh.ndim
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)

    def _concatenated(self, parameter: LiveParameter, found: list[tuple[Part, Entry]]) -> torch.Tensor:
        """The state of a flat parameter, from the slices of the parameters in it; its padding stays zero."""
        local = parameter.local
        pieces = [(part, self.shard.local_tensor(entry)) for part, entry in found]
        flat = torch.zeros(local.numel(), dtype=pieces[0][1].dtype, device=local.device)
        for part, piece in pieces:
            flat[part.position : part.position + piece.numel()].copy_(piece.view(-1))
        return flat


def _as_existing(value: Any, existing: Any) -> Any:
    """A number as a tensor, or the other way round, where the live optimizer keeps it so."""
    if isinstance(existing, torch.Tensor) and not isinstance(value, torch.Tensor):
        return value if value is None else torch.full_like(existing, value)
    if isinstance(existing, torch.Tensor) and value.numel() == existing.numel():
        return value.view(existing.shape)
    if isinstance(existing, int | float) and isinstance(value, torch.Tensor) and value.numel() == 1:
        return type(existing)(value.item())
    return value


def _like(local: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """A DTensor as another one, with this memory; a plain tensor as it is."""
    if not isinstance(live, DTensor):
        return local
    return DTensor.from_local(
        local, live.device_mesh, live.placements, run_check=False, shape=live.shape, stride=live.stride()
    )


def _check_same_place(part: Part, entry: Entry) -> None:
    if isinstance(entry, StateValue):
        raise InstallError(f"{entry.fqn}: {entry.name!r} was saved as a {type(entry.value).__name__}, not as a tensor")
    wanted, loaded = part.layout, entry.layout
    if _places(wanted) != _places(loaded):
        what = repr(entry.name) if entry.name else "the weight"
        raise InstallError(
            f"{entry.fqn}: {what} was loaded for {_boxes(loaded)}, but the model's parameter holds {_boxes(wanted)} of the "
            f"shape {wanted.global_shape} on this rank; load with the trainer's own topology"
        )


def _places(layout: TensorLayout) -> tuple[Any, ...]:
    return (layout.global_shape, layout.local_numel, layout.boxes)


def _boxes(layout: TensorLayout) -> str:
    return " and ".join(str(box.region) for box in layout.boxes) or "nothing"


@dataclass(frozen=True, slots=True)
class _Weights:
    """Finds where each loaded weight goes."""

    shard: Shard
    live: LiveModel

    def copies(self) -> list[Callable[[], None]]:
        """What is left to do once all is checked. Raises InstallError."""
        parts = [(part, p.local) for p in self.live.parameters for part in p.parts if part.layout.local_numel]
        buffers = [(Part(fqn, layout_of_tensor(buffer, name=fqn)), buffer) for fqn, buffer in self.live.buffers.items()]
        puts = [put for part, local in (*parts, *buffers) if (put := self._copy(part, local)) is not None]
        for fqn, module in self.live.extra_states.items():
            if (entry := self.shard.weight(fqn)) is not None:
                puts.append(_setter(module, self.shard.value_of(entry)))
        return puts

    def _copy(self, part: Part, local: torch.Tensor) -> Callable[[], None] | None:
        entry = self.shard.weight(*part.names)
        if entry is None:
            if self.shard.may_lack(part.fqn):
                return None
            raise InstallError(f"{part.fqn}: the shard has no weights of this name; set keys: allow_missing to go on")
        _check_same_place(part, entry)
        source = self.shard.local_tensor(entry)
        memory = local.to_local() if isinstance(local, DTensor) else local

        def put() -> None:
            place = memory.detach().view(-1)[part.position : part.position + source.numel()]
            place.copy_(source.reshape(-1))

        def put_whole() -> None:
            memory.detach().copy_(source.view(memory.shape))

        return put if source.numel() < memory.numel() else put_whole


def _setter(module: torch.nn.Module, value: Any) -> Callable[[], None]:
    return lambda: module.set_extra_state(value)
