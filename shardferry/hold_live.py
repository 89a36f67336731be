"""Copy what a live model and its optimizers hold now into an arena, with the manifest of a load: the source of other topologies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from shardferry.arena import HostArena
from shardferry.config import LoadRequest
from shardferry.errors import InstallError
from shardferry.layout.from_tensor import layout_of_tensor
from shardferry.layout.tensor_layout import TensorLayout, replicated
from shardferry.optimizer.live import LiveModel, LiveParameter, Part
from shardferry.plan.load_plan import Manifest, PlannedTensor, PlannedValue, Section
from shardferry.plan.planner import ALIGNMENT
from shardferry.state_dicts import KeyPath, ParamGroup


def hold(live: LiveModel, request: LoadRequest, *, world_rank: int, world_size: int) -> tuple[Manifest, HostArena]:
    """Copy optimizer state, and the weights where the request wants them.

    Raises:
        InstallError: an optimizer has taken no step, FSDP1 has flattened its parameters, or state is quantised.
        LayoutError: the layout of a tensor is not supported.
    """
    held = _Held()
    for group in live.groups:
        for parameter in group.parameters:
            held.add_state(parameter, _only_part(parameter))
    if request.model_key is not None:
        for parameter in live.parameters:
            part = _only_part(parameter)
            held.add_tensor("model", part.fqn, (), part.layout, parameter.local)
        for fqn, buffer in live.buffers.items():
            local = buffer.to_local() if isinstance(buffer, DTensor) else buffer
            held.add_tensor("model", fqn, (), layout_of_tensor(buffer, name=fqn), local)
    groups: list[ParamGroup] = [
        {
            **{k: v for k, v in group.group.items() if k != "params"},
            "params": [p.parts[0].fqn for p in group.parameters],
        }
        for group in live.groups
    ]
    manifest = Manifest(
        world_rank=world_rank,
        world_size=world_size,
        mesh=None,
        tensors=tuple(held.tensors),
        values=tuple(held.values),
        param_groups=tuple(groups),
        fqns=tuple(p.parts[0].fqn for group in live.groups for p in group.parameters),
        request=request,
    )
    return manifest, held.filled()


def _only_part(parameter: LiveParameter) -> Part:
    """Raises InstallError."""
    if parameter.flattened:
        raise InstallError(
            f"{parameter.parts[0].fqn}: FSDP1 has flattened it; trainers under FSDP1 can't be the source. Save a checkpoint, or wrap "
            "with FSDP2 (fully_shard)"
        )
    return parameter.parts[0]


@dataclass
class _Held:
    tensors: list[PlannedTensor] = field(default_factory=list)
    values: list[PlannedValue] = field(default_factory=list)
    sources: list[torch.Tensor] = field(default_factory=list)  # local, by entry of `tensors`
    end: int = 0  # bytes

    def add_state(self, parameter: LiveParameter, part: Part) -> None:
        now = {name: value for name, value in parameter.form.items() if f"{name}" in _first_names(parameter.state)}
        if not now and parameter.tensor.requires_grad and parameter.predicted:
            raise InstallError(f"{part.fqn}: the optimizer has no state for it yet; a source has taken a step")
        for path, value in _leaves(now, ()):
            if isinstance(value, torch.Tensor):
                local = value.to_local() if isinstance(value, DTensor) else value
                self.add_tensor("state", part.fqn, path, _layout_of(value, parameter, part), local)
            elif value is not None:
                self.values.append(PlannedValue(".".join(map(str, path)), part.fqn, path, value))

    def add_tensor(self, section: Section, fqn: str, path: KeyPath, layout: TensorLayout, local: torch.Tensor) -> None:
        if hasattr(local, "__tensor_flatten__"):
            raise InstallError(
                f"{fqn}: quantised state: {'.'.join(map(str, path)) or 'the weight'} is a {type(local).__name__}, which other "
                "topologies could not cut. Save a checkpoint, and load it with the topology that saved it"
            )
        planned = PlannedTensor(
            key=".".join(map(str, (fqn, *path))),
            fqn=fqn,
            path=path,
            dtype=local.dtype,
            layout=layout,
            arena_offset=self.end,
            section=section,
        )
        self.tensors.append(planned)
        self.sources.append(local)
        self.end += -(-planned.nbytes // ALIGNMENT) * ALIGNMENT

    def filled(self) -> HostArena:
        arena = HostArena(self.end)
        for planned, local in zip(self.tensors, self.sources, strict=True):
            arena.tensor(planned.arena_offset, planned.layout.local_shape, planned.dtype).copy_(local.detach())
        return arena


def _first_names(state: Mapping[str, Any]) -> set[str]:
    """The names of whole entries, of dotted names of their leaves."""
    return {name.partition(".")[0] for name in state}


def _layout_of(value: torch.Tensor, parameter: LiveParameter, part: Part) -> TensorLayout:
    """Plain state of a sharded parameter's local shape is of its shard."""
    if isinstance(value, DTensor) or not isinstance(parameter.tensor, DTensor):
        return layout_of_tensor(value, name=part.fqn)
    return part.layout if tuple(value.shape) == part.layout.local_shape else replicated(tuple(value.shape))


def _leaves(tree: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    """Keys of dicts as strings, positions of lists as integers."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, (*path, str(key)))
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from _leaves(value, (*path, index))
    else:
        yield path, tree
