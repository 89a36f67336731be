"""Ask a live model and its optimizers for their parameters: the FQN of each, and the region of it that this rank holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DeviceMesh, DTensor
from torch.nn import Module
from torch.optim import Optimizer

from shardferry.errors import InstallError, LayoutError
from shardferry.layout.from_tensor import layout_of_tensor
from shardferry.layout.tensor_layout import TensorLayout
from shardferry.optimizer import fsdp1
from shardferry.optimizer.forms import OptimizerForm
from shardferry.optimizer.module_form import ModuleForm
from shardferry.optimizer.wrappers import FqnCleaner, torch_optimizers
from shardferry.state_dicts import EXTRA_STATE, flat_entries

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a live tensor that belongs to one FQN."""

    fqn: str
    layout: TensorLayout
    position: int = 0  # elements, from the start of the live tensor's local memory
    aliases: tuple[str, ...] = ()  # other names of the same (tied) parameter

    @property
    def names(self) -> tuple[str, ...]:
        """The FQN and the other names."""
        return (self.fqn, *self.aliases)


@dataclass(frozen=True)
class LiveParameter:
    """One tensor that an optimizer may train."""

    tensor: torch.Tensor  # as the optimizer knows it: the key of its state
    parts: tuple[Part, ...]  # one; several where FSDP1 has flattened several parameters into this tensor
    flattened: bool = False  # by FSDP1
    state: Mapping[str, Any] = field(default_factory=dict)  # that its optimizer has now, by dotted name
    predicted: Mapping[str, Any] = field(default_factory=dict)  # after a step: tensors without memory, by dotted name
    form: Mapping[Any, Any] = field(default_factory=dict)  # both, nested as in the optimizer's state dict

    @property
    def local(self) -> torch.Tensor:
        """The local tensor of this rank."""
        return self.tensor.to_local() if isinstance(self.tensor, DTensor) else self.tensor

    @property
    def has_state(self) -> bool:
        """Whether the optimizer has state for it on this rank.

        FSDP1 takes no step on a slice that is empty here, and gathers state from the ranks that have some.
        """
        return not self.flattened or self.tensor.numel() > 0

    def expected(self, name: str) -> Any:
        """A state entry that the optimizer has, or will have; None if nothing is known of it."""
        return self.state[name] if self.state.get(name) is not None else self.predicted.get(name)


@dataclass(frozen=True)
class LiveGroup:
    """One param group of one optimizer."""

    form: OptimizerForm
    index: int  # of the group, in its optimizer
    parameters: tuple[LiveParameter, ...]

    @property
    def group(self) -> dict[str, Any]:
        """The hyperparameters, and the tensors under ``"params"``."""
        found: dict[str, Any] = self.form.optimizer.param_groups[self.index]
        return found


def as_tuple(one_or_many: T | Sequence[T]) -> tuple[T, ...]:
    """A sequence as a tuple; anything else as a tuple of one."""
    if isinstance(one_or_many, Sequence):
        return tuple(one_or_many)
    return (one_or_many,)


@dataclass(frozen=True)
class LiveModel:
    """The model parts and the optimizers of one rank, usually one of each."""

    modules: tuple[Module, ...]
    optimizers: tuple[Optimizer, ...]  # torch's own, out of their wrappers

    @classmethod
    def of(cls, model: Module | Sequence[Module], optimizer: Optimizer | Sequence[Optimizer]) -> LiveModel:
        """From the objects of a training program.

        Args:
            model: as it is trained, wrapped; several parts where a rank has several.
            optimizer: of that model, several where it has several; a program's wrapper of optimizers as well.
        """
        optimizers = tuple(one for given in as_tuple(optimizer) for one in torch_optimizers(given))
        return cls(as_tuple(model), optimizers)

    @property
    def device(self) -> torch.device:
        """The device of the first parameter; the CPU for a model without parameters."""
        parameter = next((p for module in self.modules for p in module.parameters()), None)
        return torch.device("cpu") if parameter is None else parameter.device

    @cached_property
    def forms(self) -> tuple[OptimizerForm, ...]:
        """The form of each optimizer's state dict. Raises InstallError."""
        return tuple(map(OptimizerForm.of, self.optimizers))

    @cached_property
    def parameters(self) -> tuple[LiveParameter, ...]:
        """All parameters, with the state that the optimizers have. Raises LayoutError, InstallError."""
        states = {id(p): (now, later) for form in self.forms for p, now, later in form.entries()}
        found = tuple(p for module in self.modules for p in _parameters_of(module, states))
        _refuse_equal_names(found)
        return found

    @cached_property
    def groups(self) -> tuple[LiveGroup, ...]:
        """The optimizers' param groups, in order.

        Raises:
            InstallError: an optimizer trains a tensor that is not a parameter of the model.
            LayoutError: the layout of a parameter is not supported.
        """
        known = {id(parameter.tensor): parameter for parameter in self.parameters}
        return tuple(
            LiveGroup(form, index, tuple(_members(group, index, known)))
            for form in self.forms
            for index, group in enumerate(form.optimizer.param_groups)
        )

    @cached_property
    def buffers(self) -> dict[str, torch.Tensor]:
        """Persistent buffers by FQN."""
        return {fqn: buffer for module in self.modules for fqn, buffer in _buffers_of(module)}

    @cached_property
    def extra_states(self) -> dict[str, Module]:
        """The modules that put an extra state into their state dict, by its FQN."""
        return {fqn: module for root in self.modules for fqn, module in _extra_states_of(root)}

    @cached_property
    def own_forms(self) -> tuple[ModuleForm, ...]:
        """The model parts whose own code takes part in their state dict."""
        return tuple(form for form in map(ModuleForm.of, self.modules) if form is not None)


def _members(group: dict[str, Any], index: int, known: Mapping[int, LiveParameter]) -> Iterator[LiveParameter]:
    for position, tensor in enumerate(group["params"]):
        found = known.get(id(tensor))
        if found is None:
            raise InstallError(
                f"param_groups[{index}]['params'][{position}] of shape {tuple(tensor.shape)} is not a parameter of the model; "
                "give the model that the optimizer was made for (after wrapping)"
            )
        yield found


_States = Mapping[int, tuple[Mapping[Any, Any], Mapping[Any, Any]]]  # by the tensor's id: what is there now, and later


def _parameters_of(root: Module, states: _States) -> Iterator[LiveParameter]:
    """The parameters of one model part."""
    _refuse_meshes_out_of_order(root)
    fqns = FqnCleaner.for_model(root)
    flattened: set[int] = set()
    for flat in fsdp1.flattened_parameters(root):
        flattened.add(id(flat.tensor))
        parts = tuple(_part_of(flat_part, fqns) for flat_part in flat.parts)
        yield _parameter(flat.tensor, parts, states, flattened=True)
    names: dict[int, dict[str, None]] = {}  # of each tensor, each once: two wrappers of one may show it twice
    tensors: dict[int, torch.Tensor] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        if id(parameter) not in flattened:
            tensors[id(parameter)] = parameter
            names.setdefault(id(parameter), {})[fqns.clean(name)] = None
    for key, (fqn, *aliases) in names.items():
        part = Part(fqn, layout_of_tensor(tensors[key], name=fqn), aliases=tuple(aliases))
        yield _parameter(tensors[key], (part,), states)


def _parameter(
    tensor: torch.Tensor, parts: tuple[Part, ...], states: _States, *, flattened: bool = False
) -> LiveParameter:
    now, later = states.get(id(tensor), ({}, {}))
    return LiveParameter(
        tensor, parts, flattened, state=flat_entries(now), predicted=flat_entries(later), form={**later, **now}
    )


def _refuse_equal_names(parameters: Sequence[LiveParameter]) -> None:
    owners: dict[str, torch.Tensor] = {}
    for parameter in parameters:
        for part in parameter.parts:
            if owners.setdefault(part.fqn, parameter.tensor) is not parameter.tensor:
                raise InstallError(
                    f"{part.fqn}: two of the models given have a parameter of this name. Load each from its own key: give the "
                    "optimizers as a dict {optimizer_key: optimizer}, or load them one by one"
                )


def _refuse_meshes_out_of_order(root: Module) -> None:
    """Refuse FSDP2 over a mesh whose ranks don't ascend.

    FSDP2 shards by a rank's index in its process group, and its DTensors state the index in the mesh. Where the two
    differ, a parameter doesn't tell which rows it holds. Source: torch/distributed/fsdp/_fully_shard,
    FSDPMeshInfo.shard_mesh_rank.
    """
    for name, module in root.named_modules():
        by_fsdp2 = isinstance(module, FSDPModule)
        for leaf, parameter in module.named_parameters() if by_fsdp2 else ():
            if isinstance(parameter, DTensor) and not _is_in_order(parameter.device_mesh):
                raise LayoutError(
                    f"{f'{name}.{leaf}' if name else leaf}: FSDP2 was given the mesh {parameter.device_mesh}, whose ranks are not "
                    "ascending: torch then holds other rows than it says. Make the mesh of ascending ranks"
                )


def _is_in_order(mesh: DeviceMesh) -> bool:
    """Whether ranks ascend along every axis, as process groups sort theirs."""
    return all(bool((mesh.mesh.diff(dim=axis) > 0).all()) for axis in range(mesh.ndim))


def _part_of(flat: fsdp1.FlatPart, fqns: FqnCleaner) -> Part:
    return Part(fqns.clean(flat.fqn), flat.layout, flat.position, tuple(map(fqns.clean, flat.aliases)))


def _buffers_of(root: Module) -> Iterator[tuple[str, torch.Tensor]]:
    fqns = FqnCleaner.for_model(root)
    for path, module in root.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:  # torch.nn.Module has no public name for it
                yield fqns.clean(f"{path}.{name}" if path else name), buffer


def _extra_states_of(root: Module) -> Iterator[tuple[str, Module]]:
    fqns = FqnCleaner.for_model(root)
    for path, module in root.named_modules():
        if type(module).get_extra_state is not Module.get_extra_state:
            yield fqns.clean(f"{path}.{EXTRA_STATE}" if path else EXTRA_STATE), module
