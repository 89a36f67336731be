"""Install loaded state into a live model and its optimizers, through the optimizers' own `load_state_dict`.

A load is tried on a shadow of each optimizer first. Only then are the live ones changed, and they can be put back.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Replicate as TorchReplicate

from shardferry.checkpoint.optimizer_state import SCALAR_STATE
from shardferry.errors import InstallError
from shardferry.layout.from_tensor import dtensor_placements, layout_of_tensor
from shardferry.layout.tensor_layout import TensorLayout
from shardferry.optimizer.beside import check_beside, filled_beside
from shardferry.optimizer.forms import OptimizerForm
from shardferry.optimizer.hyperparameters import GroupValues, group_values, may_change_entries, overwritten
from shardferry.optimizer.live import LiveGroup, LiveModel, LiveParameter, Part
from shardferry.optimizer.loaded_state import LoadedState, checked_tensor
from shardferry.optimizer.module_form import ModuleForm, has_own_code_in_fsdp1
from shardferry.optimizer.replace import Replacement, is_expanded, shared_tensors
from shardferry.optimizer.shadow import twins
from shardferry.optimizer.trial import Entries, SavedParam, compare_entries, try_load
from shardferry.optimizer.weights import CopyInPlace, LoadModule, SetExtraState, WeightStep
from shardferry.plan.load_plan import Entry, PlannedTensor, PlannedValue
from shardferry.plan.match_keys import Overwritten
from shardferry.state_dicts import nest, with_keys_of


def load_into(loaded: LoadedState, live: LiveModel) -> Checked:
    """Load state and hyperparameters into the optimizers, and the weights where they were loaded too.

    State that the live optimizer has already, of the same shape, dtype and device, is filled in place. Everything is checked
    and tried before anything is changed. Parameters that the load was not for (missing and allowed, or not selected) keep
    their state.

    Returns:
        What the load has overwritten, and what of it the request tolerated.

    Raises:
        InstallError: the state was loaded for other regions than the model's parameters hold, or lacks one of them, or it
            is another optimizer's. Nothing has been changed.
        LayoutError: the layout of a parameter is not supported.
    """
    checked = check(loaded, live)
    installation = fit(loaded, live, checked)
    try:
        installation.apply()
    except BaseException:
        installation.undo()
        raise
    installation.finish()
    return checked


@dataclass(frozen=True)
class Installation:
    """A load that was checked, in three steps, so that several ranks change all or nothing.

    `apply` may raise; `undo` then puts back what it has changed. `finish` follows once all ranks have applied; it can't fail.
    """

    steps: Sequence[Replacement | WeightStep]

    def apply(self) -> None:
        """Load the optimizers, and the modules whose own code takes part. Raises InstallError."""
        for step in self.steps:
            step.apply()

    def undo(self) -> None:
        """Put back what `apply` has changed."""
        with torch.no_grad():
            for step in reversed(self.steps):
                step.undo()

    def finish(self) -> None:
        """Fill state and weights in place."""
        with torch.no_grad():
            apart = shared_tensors(step for step in self.steps if isinstance(step, Replacement))
            for step in self.steps:
                if isinstance(step, Replacement):
                    step.finish(apart)
                else:
                    step.finish()


@dataclass(frozen=True)
class Checked:
    """What a load will change beside state and weights, and what of it the request tolerates."""

    updates: Sequence[_OptimizerUpdate] = ()  # by optimizer
    entries: Sequence[Entries] = ()  # by optimizer
    overwritten: tuple[Overwritten, ...] = ()  # hyperparameters
    warnings: tuple[str, ...] = ()

    @property
    def missing_entries(self) -> tuple[str, ...]:
        """State entries that the optimizer makes and that were not saved, ``<fqn>.<name>``."""
        return tuple(f"{param.fqn}.{name}" for entries in self.entries for param, name in entries.missing)

    @property
    def unexpected_entries(self) -> tuple[str, ...]:
        """State entries that were saved and that the optimizer has no use for, ``<fqn>.<name>``."""
        return tuple(f"{param.fqn}.{name}" for entries in self.entries for param, name in entries.unexpected)

    def report(self) -> tuple[tuple[str, ...], tuple[str, ...], tuple[Overwritten, ...], tuple[str, ...]]:
        """Missing entries, unexpected entries, overwritten hyperparameters, warnings."""
        return self.missing_entries, self.unexpected_entries, self.overwritten, self.warnings


def check(loaded: LoadedState, live: LiveModel) -> Checked:
    """Check and try a load. Nothing of it needs to have been read but the values.

    Args:
        loaded: over a manifest alone will do.

    Raises:
        InstallError, LayoutError: as `load_into`.
    """
    updates: list[_OptimizerUpdate] = []
    found: list[Entries] = []
    warnings: list[str] = []
    forms = _forms(loaded, live)
    if forms:
        warnings += check_beside(forms, loaded.extras, loaded.request.keys)
    for index, form in enumerate(forms):
        update = _OptimizerUpdate.of(loaded, live, index)
        entries = compare_entries(
            form.optimizer,
            update.saved_params(loaded),
            update.hyperparameters(),
            policy=loaded.request.keys,
            known=None if any(map(may_change_entries, update.overwritten)) else form.predicted,
        )
        _refuse_one_ranks(update, loaded)
        try_load(
            form.optimizer,
            update.state_dict(_Source(loaded, without_memory=True), entries),
            steps=not entries.unknown,
        )
        updates.append(update)
        found.append(entries)
        warnings += [new.warning for new in update.values if new.warning]
        if entries.unknown:
            warnings.append(f"{type(form.optimizer).__name__}: its state can't be predicted ({entries.unknown})")
    changes = tuple(change for update in updates for change in update.overwritten)
    return Checked(updates, found, changes, tuple(warnings))


def _refuse_one_ranks(update: _OptimizerUpdate, loaded: LoadedState) -> None:
    """Refuse state and hyperparameters that each rank computes of its part alone: torch saves one rank's. Raises InstallError."""
    form = update.form
    if form.predicted is None:
        return
    for group, there in zip(update.groups, update.params, strict=True):
        of_one_rank = dict(zip(map(id, group.parameters), form.predicted.of_one_rank[group.index], strict=True))
        for parameter in there:
            entries = loaded.entries(*parameter.parts[0].names)
            for name in sorted(of_one_rank[id(parameter)] & entries.keys()):
                if not entries[name].is_parts:
                    raise _one_ranks(form, f"{parameter.parts[0].fqn}: {name!r}")
    policy, saved = loaded.request.hyperparameters, {name for group in loaded.param_groups for name in group}
    for name in sorted(name.partition(".")[0] for name in form.predicted.groups_of_one_rank):
        if name in saved and not policy.keeps(name):
            raise _one_ranks(form, f"param_groups: {name!r}")


def _one_ranks(form: OptimizerForm, what: str) -> InstallError:
    return InstallError(
        f"{what}: {type(form.optimizer).__name__} computes it of this rank's part of a sharded parameter alone, so that each rank had "
        "another one, and the checkpoint has one rank's: torch saves once what is no DTensor. Save such state as DTensors, leave the "
        "parameter out with exclude, or keep the hyperparameter with hyperparameters: {live: [...]}; nothing was changed"
    )


def _forms(loaded: LoadedState, live: LiveModel) -> tuple[OptimizerForm, ...]:
    """Of the optimizers that the load is for: none where weights alone were asked for."""
    return () if loaded.request.optimizer_key is None else live.forms


def fit(loaded: LoadedState, live: LiveModel, checked: Checked) -> Installation:
    """Prepare a load that was read.

    Args:
        checked: what `check` has found.

    Raises:
        InstallError, LayoutError: as `load_into`.
    """
    source = _Source(loaded)
    steps: list[Replacement | WeightStep] = [
        Replacement(update.form.optimizer, update.state_dict(source, entries))
        for update, entries in zip(checked.updates, checked.entries, strict=True)
    ]
    return Installation([*steps, *(_weight_steps(loaded, live) if loaded.has_weights else ())])


@dataclass(frozen=True)
class _OptimizerUpdate:
    """New hyperparameters of one optimizer, and the parameters that get new state."""

    form: OptimizerForm
    groups: Sequence[LiveGroup]
    values: Sequence[GroupValues]  # by group
    params: Sequence[Sequence[LiveParameter]]  # by group: those that the load is for
    overwritten: Sequence[Overwritten]

    @classmethod
    def of(cls, loaded: LoadedState, live: LiveModel, index: int) -> _OptimizerUpdate:
        """Of the optimizer at an index. Raises InstallError."""
        form = live.forms[index]
        groups = [group for group in live.groups if group.form is form]
        params = [[p for p in group.parameters if _is_covered(loaded, p)] for group in groups]
        known = {"lr", *form.optimizer.defaults}
        values = [
            group_values(
                [_saved_name(loaded, part) for p in there for part in p.parts],
                loaded.param_groups,
                group.group,
                known=known,
                policy=loaded.request.hyperparameters,
            )
            for group, there in zip(groups, params, strict=True)
        ]
        first = next((number for number, group in enumerate(live.groups) if group.form is form), 0)
        changes = [
            change
            for group, new in zip(groups, values, strict=True)
            for change in overwritten(first + group.index, group.group, new.values)
        ]
        return cls(form, groups, values, params, overwritten=changes)

    def hyperparameters(self) -> list[dict[str, Any]]:
        """By group, all that it will have."""
        return [
            {**{name: value for name, value in group.group.items() if name != "params"}, **new.values}
            for group, new in zip(self.groups, self.values, strict=True)
        ]

    def saved_params(self, loaded: LoadedState) -> list[SavedParam]:
        """The parameters that the load is for, with the names of their saved entries."""
        found = []
        for group, there in zip(self.groups, self.params, strict=True):
            positions = {id(parameter): position for position, parameter in enumerate(group.parameters)}
            for parameter in there:
                entries = loaded.entries(*parameter.parts[0].names).values()
                saved = {str(e.path[0]) for e in entries if not isinstance(e, PlannedValue) or e.value is not None}
                now = {name.partition(".")[0] for name, value in parameter.state.items() if value is not None}
                found.append(
                    SavedParam(
                        tensor=parameter.tensor,
                        fqn=parameter.parts[0].fqn,
                        group=group.index,
                        position=positions[id(parameter)],
                        saved=saved if parameter.has_state else frozenset(),
                        live=now,
                    )
                )
        return found

    def state_dict(self, source: _Source, entries: Entries) -> dict[str, Any]:
        """What `load_state_dict` gets: the optimizer's own state dict, with the loaded entries and hyperparameters in it.

        Args:
            entries: those that only one side has.
        """
        form = self.form
        live, new = form.state_dict["state"], {}
        for group, hyperparameters, there in zip(self.groups, self.hyperparameters(), self.params, strict=True):
            keys = dict(zip((id(p.tensor) for p in group.parameters), form.keys[group.index], strict=True))
            on_device = bool(hyperparameters.get("fused") or hyperparameters.get("capturable"))
            builder = _StateBuilder(source, scalars_on_device=on_device)
            for parameter in there:
                dropped, kept = entries.dropped(parameter.tensor), entries.kept(parameter.tensor)
                key = keys[id(parameter.tensor)]
                built = {name: value for name, value in builder.state_of(parameter).items() if str(name) not in dropped}
                stays = {name: value for name, value in live.get(key, {}).items() if str(name) in kept} if built else {}
                new[key] = source.live(stays) | built
        stay = {key: source.live(value) for key, value in live.items() if key not in new}
        filled = filled_beside(form, source.loaded.extras, without_memory=source.without_memory)
        state = stay | filled["state"] | {key: value for key, value in new.items() if value}
        groups = [
            {**source.live(packed), **copy.deepcopy(dict(new.values))}
            for packed, new in zip(form.state_dict["param_groups"], self.values, strict=True)
        ]
        return {**filled, "state": state, "param_groups": groups}


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


@dataclass(frozen=True, slots=True)
class _Source:
    """Gives planned tensors: loaded ones, or such without memory for a trial."""

    loaded: LoadedState
    without_memory: bool = False

    def local_tensor(self, tensor: PlannedTensor, device: torch.device) -> torch.Tensor:
        """The local tensor, on a device. For a trial a single number is one on the CPU, as optimizers look at these."""
        if not self.without_memory:
            return self.loaded.local_tensor(tensor).to(device)
        shape, dtype = tensor.layout.local_shape, tensor.cast or tensor.dtype
        return torch.empty(shape, dtype=dtype, device="meta") if shape else torch.ones(shape, dtype=dtype)

    def live(self, tree: Any) -> Any:
        """Live state that stays. For a trial, which would change it, a copy."""
        return twins(tree) if self.without_memory else tree

    def device(self, device: torch.device) -> torch.device:
        """Where a tensor is put together."""
        return torch.device("meta") if self.without_memory else device


@dataclass(frozen=True, slots=True)
class _StateBuilder:
    """Builds the state of parameters in the form that their optimizer wants."""

    source: _Source
    scalars_on_device: bool  # fused and capturable optimizers keep ``step`` on the device

    def state_of(self, parameter: LiveParameter) -> dict[Any, Any]:
        """All entries of one parameter, nested as the optimizer's state dict has them."""
        if not parameter.has_state:
            return {}
        found: dict[str, list[tuple[Part, Entry]]] = {}
        for part in parameter.parts:
            for name, entry in self.source.loaded.entries(*part.names).items():
                found.setdefault(name, []).append((part, entry))
        entries = {pairs[0][1].path: self._value(parameter, name, pairs) for name, pairs in sorted(found.items())}
        nested: dict[Any, Any] = with_keys_of(parameter.form, nest(entries))
        return nested

    def _value(self, parameter: LiveParameter, name: str, found: list[tuple[Part, Entry]]) -> Any:
        value = self._row_major(parameter, name, found)
        return _with_strides(value, parameter.expected(name)) if isinstance(value, torch.Tensor) else value

    def _row_major(self, parameter: LiveParameter, name: str, found: list[tuple[Part, Entry]]) -> Any:
        _, first = found[0]
        expected = parameter.expected(name)
        if isinstance(first, PlannedValue):
            value = copy.deepcopy(first.value)
            return self._step(parameter, _converted(value, expected)) if name in SCALAR_STATE else value
        if name in SCALAR_STATE:
            device = parameter.local.device if self.scalars_on_device else torch.device("cpu")
            # In the shape in which it was saved, unless the live optimizer has another one: both count alike.
            value = _converted(self.source.local_tensor(first, device), parameter.state.get(name))
            return self._step(parameter, value)
        device = self._device(parameter, name)
        if not first.layout.global_shape:
            value = self.source.local_tensor(first, device)
            return self._factor(parameter, first, value, expected)
        if not first.sharded_like_param:
            return self._factor(parameter, first, self.source.local_tensor(first, device), expected)
        return self._moment(parameter, name, found, device)

    def _step(self, parameter: LiveParameter, value: Any) -> Any:
        """``step`` is counted in float32, whatever it was saved as, and stays on the CPU where the optimizer wants it there."""
        if not isinstance(value, torch.Tensor):
            return value
        device = parameter.local.device if self.scalars_on_device and not self.source.without_memory else value.device
        return value.to(device=device, dtype=torch.float32 if value.is_floating_point() else value.dtype)

    @staticmethod
    def _device(parameter: LiveParameter, name: str) -> torch.device:
        """State that the live optimizer keeps elsewhere than its parameter, on the CPU for one, stays there."""
        live = parameter.state.get(name)
        return live.device if isinstance(live, torch.Tensor) else parameter.local.device

    def _factor(
        self, parameter: LiveParameter, tensor: PlannedTensor, local: torch.Tensor, expected: Any
    ) -> torch.Tensor:
        """State with a layout of its own: a DTensor where the optimizer makes one.

        Where that isn't known, it is one beside a DTensor: torch doesn't compute with a mix of them.
        """
        live, shape = parameter.tensor, tensor.layout.global_shape
        if isinstance(expected, DTensor):
            return _like(local, expected)
        if expected is not None or not isinstance(live, DTensor) or not shape:
            return local
        mesh = live.device_mesh
        placed = tensor.layout.placements is not None and len(tensor.layout.placements) == mesh.ndim
        placements = dtensor_placements(tensor.layout, mesh) if placed else [TorchReplicate()] * mesh.ndim
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)

    def _moment(
        self, parameter: LiveParameter, name: str, found: list[tuple[Part, Entry]], device: torch.device
    ) -> torch.Tensor:
        """State with the shape and the layout of its parameter."""
        expected = parameter.expected(name)
        pieces = self._pieces(parameter, name, found)
        (part, tensor), live = pieces[0], parameter.local
        if len(pieces) == 1 and part.position == 0 and part.layout.local_numel == live.numel():
            local = self.source.local_tensor(tensor, device)
        else:
            local = self._concatenated(live, pieces, device)
        _check_class(part.fqn, tensor, expected)
        local = local if local.shape == live.shape else local.view(live.shape)
        wants_local = isinstance(expected, torch.Tensor) and expected.ndim and not isinstance(expected, DTensor)
        return local if wants_local else _like(local, parameter.tensor)

    def _pieces(
        self, parameter: LiveParameter, name: str, found: list[tuple[Part, Entry]]
    ) -> list[tuple[Part, PlannedTensor]]:
        """The state of all parameters in a tensor. Raises InstallError: one lacks it, or was loaded for other regions."""
        if len(found) < len(parameter.parts):
            lacking = next(p.fqn for p in parameter.parts if p not in [there for there, _ in found])
            raise InstallError(f"{lacking}: has no {name!r}, which the other parameters of its flat parameter have")
        return [(part, checked_tensor(part.fqn, entry, part.layout)) for part, entry in found]

    def _concatenated(
        self, live: torch.Tensor, pieces: list[tuple[Part, PlannedTensor]], device: torch.device
    ) -> torch.Tensor:
        """The state of a flat parameter, from the slices of the parameters in it; its padding stays zero."""
        if any(tensor.chunk is not None for _, tensor in pieces):
            raise InstallError(
                f"{pieces[0][0].fqn}: quantised state: it was saved as a tensor of a class of its own, and FSDP1 has flattened the "
                "parameter; use FSDP2 (fully_shard), or leave the parameter out with exclude; nothing was changed"
            )
        sources = [(part, self.source.local_tensor(tensor, device)) for part, tensor in pieces]
        flat = torch.zeros(live.numel(), dtype=sources[0][1].dtype, device=self.source.device(device))
        for part, source in sources:
            flat[part.position : part.position + source.numel()].copy_(source.view(-1))
        return flat


def _check_class(fqn: str, loaded: PlannedTensor, expected: Any) -> None:
    """Refuse quantised state for an optimizer that makes plain tensors, or those of another class. Raises InstallError."""
    if loaded.value is None or not isinstance(expected, torch.Tensor):
        return
    made = expected.to_local() if isinstance(expected, DTensor) else expected
    if type(loaded.value) is not type(made):
        raise InstallError(
            f"{fqn}: quantised state: {loaded.name!r} was saved as a {type(loaded.value).__name__}, the optimizer has a "
            f"{type(made).__name__}; load it into the optimizer that saved it; nothing was changed"
        )


def _converted(value: Any, expected: Any) -> Any:
    """A number as a tensor, or a tensor as a number, where the optimizer has it so."""
    if isinstance(expected, torch.Tensor) and not isinstance(value, torch.Tensor):
        if not isinstance(value, bool | int | float):
            return value
        device = "cpu" if expected.is_meta else expected.device
        return torch.full(expected.shape, value, dtype=expected.dtype, device=device)
    if isinstance(expected, torch.Tensor) and not isinstance(expected, DTensor) and value.numel() == expected.numel():
        return value.view(expected.shape)
    if isinstance(expected, int | float) and isinstance(value, torch.Tensor) and value.numel() == 1:
        return type(expected)(value.item())
    return value


def _with_strides(value: torch.Tensor, expected: Any) -> torch.Tensor:
    """A local tensor with its elements in the order in memory that the optimizer has them in: sums round by it."""
    if type(value) is not torch.Tensor or type(expected) is not torch.Tensor or value.shape != expected.shape:
        return value
    if value.stride() == expected.stride() or not value.numel() or is_expanded(expected):
        return value
    return torch.empty_strided(value.shape, expected.stride(), dtype=value.dtype, device=value.device).copy_(value)


def _like(local: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """A local tensor as a DTensor with the mesh, placements and shape of another one; as it is beside a plain tensor."""
    if not isinstance(live, DTensor):
        return local
    return DTensor.from_local(
        local, live.device_mesh, live.placements, run_check=False, shape=live.shape, stride=live.stride()
    )


def _weight_steps(loaded: LoadedState, live: LiveModel) -> list[WeightStep]:
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
            if source is not None and is_expanded(local):
                raise InstallError(
                    f"{part.fqn}: is an expanded tensor, of which several elements are one in memory; weights are loaded in place, as "
                    "torch does. Give the module a copy (`clone()`), or exclude it"
                )
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
