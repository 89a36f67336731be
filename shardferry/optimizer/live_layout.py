"""The layout that a live model and its optimizers want on this rank, as planning asks for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.distributed.tensor import DTensor

from shardferry.checkpoint.optimizer_state import SCALAR_STATE
from shardferry.errors import LayoutError
from shardferry.layout.from_tensor import has_own_chunks, layout_of_tensor
from shardferry.layout.live import LiveEntry, LiveLayout
from shardferry.layout.tensor_layout import TensorLayout, replicated
from shardferry.optimizer.live import LiveGroup, LiveModel, LiveParameter, Part


def live_layout(live: LiveModel, *, world_rank: int, world_size: int) -> LiveLayout:
    """The layout that a live model and its optimizers want on this rank.

    Raises:
        InstallError: an optimizer trains a tensor that is not a parameter of the model.
        LayoutError: the layout of a parameter is not supported.
    """
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
        groups=_fqns_of(live.groups),
        buffers={fqn: layout_of_tensor(buffer, name=fqn) for fqn, buffer in live.buffers.items()},
        untrained=_layouts([p for p in live.parameters if id(p.tensor) not in own]),
        extras=frozenset(live.extra_states),
        own_weights={fqn: layout_of_tensor(t, name=fqn) for form in live.own_forms for fqn, t in form.tensors.items()},
        within_own=frozenset(name for form in live.own_forms for name in form.replaced),
        dtypes={part.fqn: parameter.tensor.dtype for parameter in live.parameters for part in parameter.parts}
        | {fqn: buffer.dtype for fqn, buffer in live.buffers.items()}
        | {fqn: tensor.dtype for form in live.own_forms for fqn, tensor in form.tensors.items()},
    )


def _layouts(parameters: Sequence[LiveParameter]) -> dict[str, TensorLayout]:
    return {part.fqn: part.layout for parameter in parameters for part in parameter.parts}


def _fqns_of(groups: Sequence[LiveGroup]) -> tuple[tuple[str, ...], ...] | None:
    """The FQNs of each group in order; None where a flat parameter stands for several."""
    if any(parameter.flattened for group in groups for parameter in group.parameters):
        return None
    return tuple(tuple(parameter.parts[0].fqn for parameter in group.parameters) for group in groups)


def _entries_of(parameter: LiveParameter) -> Iterator[tuple[Part, str, LiveEntry]]:
    """Layout and dtype of the state tensors that the optimizer has, or will have."""
    for name in {**parameter.predicted, **parameter.state}:
        value, is_predicted = parameter.expected(name), parameter.state.get(name) is None
        if isinstance(value, torch.Tensor) and value.ndim and name not in SCALAR_STATE:
            for part in parameter.parts:
                yield part, name, LiveEntry(_layout_of_entry(parameter, part, value, name), value.dtype, is_predicted)


def _layout_of_entry(parameter: LiveParameter, part: Part, value: torch.Tensor, name: str) -> TensorLayout | None:
    """The layout of a state tensor; None where it is its parameter's."""
    if isinstance(value, DTensor):
        where = f"{part.fqn}: {name!r}"
        if _is_placed_by_chunks(parameter, part) and not has_own_chunks(value) and _is_sharded(value):
            if _has_form_of(value, parameter):
                return None
            raise LayoutError(
                f"{where}: the parameter's own __create_chunk_list__ contradicts its placements, so that those of a state tensor "
                f"of the shape {tuple(value.shape)} don't tell its rows either; give its local tensor that method too"
            )
        layout = layout_of_tensor(value, name=where)
        return None if layout == part.layout else layout
    if parameter.flattened or value.shape == parameter.local.shape:
        return None
    return replicated(tuple(value.shape))


def _is_placed_by_chunks(parameter: LiveParameter, part: Part) -> bool:
    """Whether the parameter's local tensor says itself what it holds, and its placements don't say the same."""
    return has_own_chunks(parameter.tensor) and part.layout.placements is None


def _is_sharded(value: DTensor) -> bool:
    return not all(placement.is_replicate() for placement in value.placements)


def _has_form_of(value: DTensor, parameter: LiveParameter) -> bool:
    """Whether a state tensor is laid out as its parameter is: torch makes it from the local tensor, ``zeros_like`` for one."""
    live = parameter.tensor
    return (
        isinstance(live, DTensor)
        and (value.device_mesh, value.placements, value.shape) == (live.device_mesh, live.placements, live.shape)
        and value.to_local().shape == live.to_local().shape
    )
