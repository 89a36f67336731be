"""Ask live models and optimizers which parameters they hold, under which FQN, and which part of each is here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DeviceMesh, DTensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from shardferry.checkpoint.optimizer_state import SCALAR_STATE
from shardferry.errors import InstallError, LayoutError
from shardferry.layout.from_tensor import layout_of_tensor
from shardferry.layout.live import LiveEntry, LiveLayout
from shardferry.layout.tensor_layout import TensorLayout, replicated
from shardferry.optimizer import fsdp1
from shardferry.optimizer.wrappers import torch_optimizers
from shardferry.state_dicts import flat_entries

T = TypeVar("T")

# What wrappers put into the names of parameters; the checkpoint's FQNs are without them.
_WRAPPERS = (
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
    "_orig_mod.",
    "_forward_module.",  # Lightning Fabric's module has both, mostly the same one
    "_original_module.",
)
_DDP = "module."
_EXTRA = "_extra_state"  # as torch.nn.Module.state_dict calls it


@dataclass(frozen=True, slots=True)
class Part:
    """What a live tensor holds of one FQN."""

    fqn: str
    layout: TensorLayout
    position: int = 0  # elements, where it begins in the live tensor's local memory
    aliases: tuple[str, ...] = ()  # other names of the same (tied) parameter

    @property
    def names(self) -> tuple[str, ...]:
        return (self.fqn, *self.aliases)


@dataclass(frozen=True)
class LiveParameter:
    """One tensor that an optimizer may train."""

    tensor: torch.Tensor  # as the optimizer knows it: the key of its state
    parts: tuple[Part, ...]  # one, or several where FSDP1 has flattened parameters together
    flattened: bool = False  # by FSDP1
    state: Mapping[str, Any] = field(default_factory=dict)  # what its optimizer has, by dotted name

    @property
    def local(self) -> torch.Tensor:
        """The memory of this rank."""
        return self.tensor.to_local() if isinstance(self.tensor, DTensor) else self.tensor

    @property
    def has_state(self) -> bool:
        """FSDP1 takes no step on a slice that is empty here, and gathers state by who has some."""
        return not self.flattened or self.tensor.numel() > 0


@dataclass(frozen=True)
class LiveGroup:
    """One param group of one optimizer."""

    optimizer: Optimizer
    group: dict[str, Any]
    parameters: tuple[LiveParameter, ...]


def as_tuple(one_or_many: T | Sequence[T]) -> tuple[T, ...]:
    """One thing, or several."""
    if isinstance(one_or_many, Sequence):
        return tuple(one_or_many)
    return (one_or_many,)


@dataclass(frozen=True)
class LiveModel:
    """The model parts and optimizers of one rank, usually one of each."""

    modules: tuple[Module, ...]
    optimizers: tuple[Optimizer, ...]

    @classmethod
    def of(cls, model: Module | Sequence[Module], optimizer: Optimizer | Sequence[Optimizer]) -> LiveModel:
        """From what people hold in their hands: one or several, a program's wrappers among them."""
        optimizers = tuple(one for given in as_tuple(optimizer) for one in torch_optimizers(given))
        return cls(as_tuple(model), optimizers)

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        parameter = next((p for module in self.modules for p in module.parameters()), None)
        return torch.device("cpu") if parameter is None else parameter.device

    @cached_property
    def parameters(self) -> tuple[LiveParameter, ...]:
        """All parameters, with the state that the optimizers have. Raises LayoutError."""
        states = {id(p): state for optimizer in self.optimizers for p, state in optimizer.state.items()}
        return tuple(p for module in self.modules for p in _parameters_of(module, states))

    @cached_property
    def groups(self) -> tuple[LiveGroup, ...]:
        """The optimizers' param groups, in order.

        Raises:
            InstallError: an optimizer trains a tensor that is no parameter of the model.
            LayoutError: a parameter lies in a way that isn't supported.
        """
        known = {id(parameter.tensor): parameter for parameter in self.parameters}
        return tuple(
            LiveGroup(optimizer, group, tuple(_members(group, index, known)))
            for optimizer in self.optimizers
            for index, group in enumerate(optimizer.param_groups)
        )

    @cached_property
    def buffers(self) -> dict[str, torch.Tensor]:
        """Persistent buffers by FQN."""
        return {fqn: buffer for module in self.modules for fqn, buffer in _buffers_of(module)}

    @cached_property
    def extra_states(self) -> dict[str, Module]:
        """Modules that put an extra state into their state dict, by its FQN."""
        return {
            _clean(f"{name}.{_EXTRA}" if name else _EXTRA, _ddp_prefixes(root)): module
            for root in self.modules
            for name, module in root.named_modules()
            if type(module).get_extra_state is not Module.get_extra_state
        }


def _members(group: dict[str, Any], index: int, known: Mapping[int, LiveParameter]) -> Iterator[LiveParameter]:
    for place, tensor in enumerate(group["params"]):
        found = known.get(id(tensor))
        if found is None:
            raise InstallError(
                f"param_groups[{index}]['params'][{place}] of shape {tuple(tensor.shape)} is no parameter of the model; "
                "give the model that the optimizer was made for (after wrapping)"
            )
        yield found


def _parameters_of(root: Module, states: Mapping[int, Any]) -> Iterator[LiveParameter]:
    _refuse_meshes_out_of_order(root)
    prefixes = _ddp_prefixes(root)
    flattened: set[int] = set()
    for flat in fsdp1.flattened_parameters(root):
        flattened.add(id(flat.tensor))
        parts = tuple(_part_of(flat_part, prefixes) for flat_part in flat.parts)
        state = flat_entries(states.get(id(flat.tensor), {}))
        yield LiveParameter(flat.tensor, parts, flattened=True, state=state)
    names: dict[int, dict[str, None]] = {}  # of each tensor, each once: two wrappers of one may show it twice
    tensors: dict[int, torch.Tensor] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        if id(parameter) not in flattened:
            tensors[id(parameter)] = parameter
            names.setdefault(id(parameter), {})[_clean(name, prefixes)] = None
    for key, (fqn, *aliases) in names.items():
        part = Part(fqn, layout_of_tensor(tensors[key], name=fqn), aliases=tuple(aliases))
        yield LiveParameter(tensors[key], (part,), state=flat_entries(states.get(key, {})))


def _refuse_meshes_out_of_order(root: Module) -> None:
    """FSDP2 cuts by a rank's place in its process group, and its DTensors say the place in the mesh.

    Where the two differ, nobody can tell from a parameter what it holds. Source: torch/distributed/fsdp/_fully_shard,
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
    """Whether ranks ascend along every axis: process groups sort theirs."""
    return all(bool((mesh.mesh.diff(dim=axis) > 0).all()) for axis in range(mesh.ndim))


def _part_of(flat: fsdp1.FlatPart, ddp_prefixes: Sequence[str]) -> Part:
    aliases = tuple(_clean(alias, ddp_prefixes) for alias in flat.aliases)
    return Part(_clean(flat.fqn, ddp_prefixes), flat.layout, flat.position, aliases)


def _buffers_of(root: Module) -> Iterator[tuple[str, torch.Tensor]]:
    prefixes = _ddp_prefixes(root)
    for path, module in root.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:  # torch.nn.Module has no public word for it
                yield _clean(f"{path}.{name}" if path else name, prefixes), buffer


def _ddp_prefixes(root: Module) -> list[str]:
    """Where DDP's ``module.`` stands in names; only there it is a wrapper's."""
    wrapped = [name for name, module in root.named_modules() if isinstance(module, DistributedDataParallel)]
    return sorted((f"{name}.{_DDP}" if name else _DDP for name in wrapped), key=len, reverse=True)


def _clean(name: str, ddp_prefixes: Sequence[str]) -> str:
    """A parameter's name without what wrappers added."""
    for prefix in ddp_prefixes:
        if name.startswith(prefix):
            name = name[: len(prefix) - len(_DDP)] + name[len(prefix) :]
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def live_layout(live: LiveModel, *, world_rank: int, world_size: int) -> LiveLayout:
    """The layout that live models and optimizers want. Raises InstallError, LayoutError."""
    trained = [parameter for group in live.groups for parameter in group.parameters]
    own = {id(parameter.tensor) for parameter in trained}
    parts = [part for parameter in live.parameters for part in parameter.parts]
    return LiveLayout(
        world_rank,
        world_size,
        _layouts(trained),
        entries={(p.fqn, name): entry for parameter in trained for p, name, entry in _entries_of(parameter)},
        tied={part.fqn: part.aliases for part in parts if part.aliases},
        frozen=frozenset(p.fqn for x in trained if not x.tensor.requires_grad for p in x.parts),
        groups=_positions(live.groups),
        buffers={fqn: layout_of_tensor(buffer, name=fqn) for fqn, buffer in live.buffers.items()},
        untrained=_layouts([p for p in live.parameters if id(p.tensor) not in own]),
        extras=frozenset(live.extra_states),
        dtypes={part.fqn: parameter.tensor.dtype for parameter in live.parameters for part in parameter.parts}
        | {fqn: buffer.dtype for fqn, buffer in live.buffers.items()},
    )


def _layouts(parameters: Sequence[LiveParameter]) -> dict[str, TensorLayout]:
    return {part.fqn: part.layout for parameter in parameters for part in parameter.parts}


def _positions(groups: Sequence[LiveGroup]) -> tuple[tuple[str, ...], ...] | None:
    if any(parameter.flattened for group in groups for parameter in group.parameters):
        return None  # a flat parameter stands for many
    return tuple(tuple(parameter.parts[0].fqn for parameter in group.parameters) for group in groups)


def _entries_of(parameter: LiveParameter) -> Iterator[tuple[Part, str, LiveEntry]]:
    """What is known of the state that an optimizer has already made."""
    for name, value in parameter.state.items():
        if isinstance(value, torch.Tensor) and value.ndim and name not in SCALAR_STATE:
            for part in parameter.parts:
                yield part, name, LiveEntry(_layout_of_entry(parameter, part, value, name), value.dtype)


def _layout_of_entry(parameter: LiveParameter, part: Part, value: torch.Tensor, name: str) -> TensorLayout | None:
    """None where the entry lies as its parameter."""
    if isinstance(value, DTensor):
        layout = layout_of_tensor(value, name=f"{part.fqn}: {name!r}")
        return None if layout == part.layout else layout
    if parameter.flattened or value.shape == parameter.local.shape:
        return None
    return replicated(tuple(value.shape))
