"""Put loaded state into a live optimizer: the tensors by FQN, the param groups by their parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from shardferry.errors import InstallError
from shardferry.layout import TensorLayout
from shardferry.live import LiveParameter, Part, live_parameters
from shardferry.param_groups import hyperparameters_for
from shardferry.wrappers import param_groups, torch_optimizers

if TYPE_CHECKING:
    from shardferry.handoff import Shard, StateTensor

_STEP = "step"


def load_into(shard: Shard, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Replace an optimizer's state and hyperparameters by a shard's.

    State on the shard's own device is used as it is, without a copy; other state is copied to its parameter's device.
    Everything is checked before anything is replaced.

    Raises:
        InstallError: the shard lies otherwise than the model's parameters, or lacks one of them.
    """
    groups = live_parameters(model, optimizer)
    hyperparameters = [
        hyperparameters_for([part.fqn for parameter in group for part in parameter.parts], shard.param_groups)
        if shard.param_groups
        else {}
        for group in groups
    ]
    state: dict[torch.Tensor, dict[str, Any]] = {}
    for group, parameters, values in zip(param_groups(optimizer), groups, hyperparameters, strict=True):
        flags = {**group, **values}  # as they will be: a fused or capturable optimizer keeps `step` on the device
        on_device = bool(flags.get("fused") or flags.get("capturable"))
        for parameter in parameters:
            if entries := _state_of(shard, parameter, step_on_device=on_device):
                state[parameter.tensor] = entries
    for group, values in zip(param_groups(optimizer), hyperparameters, strict=True):
        group.update(values)
    for one in torch_optimizers(optimizer):
        _replace_state(one, state)


def _replace_state(optimizer: torch.optim.Optimizer, state: Mapping[torch.Tensor, dict[str, Any]]) -> None:
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.state.clear()
    optimizer.state.update({parameter: state[parameter] for parameter in trained if parameter in state})
    # What torch's own load_state_dict ends with: optimizers fill in defaults of older checkpoints here.
    optimizer.__setstate__({"state": optimizer.state, "param_groups": optimizer.param_groups})


def _state_of(shard: Shard, parameter: LiveParameter, *, step_on_device: bool) -> dict[str, Any]:
    if not parameter.has_state:
        return {}
    entries = [(part, shard.entries(part.fqn)) for part in parameter.parts]
    names = {name for _, by_name in entries for name in by_name}
    return {name: _value(shard, parameter, name, entries, step_on_device=step_on_device) for name in sorted(names)}


def _value(
    shard: Shard,
    parameter: LiveParameter,
    name: str,
    entries: list[tuple[Part, Mapping[str, StateTensor | Any]]],
    *,
    step_on_device: bool,
) -> Any:
    found = [(part, by_name[name]) for part, by_name in entries if name in by_name]
    part, first = found[0]
    if not shard.is_tensor(first):
        return first
    if _is_scalar(first, name, part):
        return _placed(shard.local_tensor(first), parameter, keep=name == _STEP and not step_on_device)
    if len(found) < len(entries):
        lacking = next(part.fqn for part, by_name in entries if name not in by_name)
        raise InstallError(f"{lacking}: has no {name!r}, which the other parameters of its flat parameter have")
    for part, entry in found:
        _check_same_place(part, entry)
    if len(found) == 1 and part.position == 0 and _covers(part, parameter):
        local = _placed(shard.local_tensor(first), parameter, keep=False)
    else:
        local = _concatenated(shard, parameter, found)
    return _as_parameter(local, parameter)


def _is_scalar(entry: StateTensor, name: str, part: Part) -> bool:
    """State that every rank has whole: not cut as the parameter is."""
    shape = entry.layout.global_shape
    return name == _STEP or shape != part.layout.global_shape


def _check_same_place(part: Part, entry: StateTensor) -> None:
    wanted, loaded = part.layout, entry.layout
    if _places(wanted) != _places(loaded):
        raise InstallError(
            f"{entry.fqn}: {entry.name!r} was loaded for {_boxes(loaded)}, but the model's parameter holds {_boxes(wanted)} of the "
            f"shape {wanted.global_shape} on this rank; load with the trainer's own topology"
        )


def _places(layout: TensorLayout) -> tuple[Any, ...]:
    return (layout.global_shape, layout.local_numel, layout.boxes)


def _boxes(layout: TensorLayout) -> str:
    return " and ".join(str(box.region) for box in layout.boxes) or "nothing"


def _covers(part: Part, parameter: LiveParameter) -> bool:
    return part.layout.local_numel == parameter.local.numel()


def _concatenated(shard: Shard, parameter: LiveParameter, found: list[tuple[Part, StateTensor]]) -> torch.Tensor:
    """The state of a flat parameter, from the slices of the parameters in it; its padding stays zero."""
    local = parameter.local
    flat = torch.zeros(local.numel(), dtype=found[0][1].dtype, device=local.device)
    for part, entry in found:
        piece = shard.local_tensor(entry)
        flat[part.position : part.position + piece.numel()].copy_(piece.view(-1))
    return flat


def _placed(tensor: torch.Tensor, parameter: LiveParameter, *, keep: bool) -> torch.Tensor:
    """On the parameter's device; ``keep`` leaves ``step`` on the CPU, where optimizers that aren't fused want it."""
    return tensor if keep else tensor.to(parameter.local.device)


def _as_parameter(local: torch.Tensor, parameter: LiveParameter) -> torch.Tensor:
    live = parameter.tensor
    local = local.view(parameter.local.shape)
    if not isinstance(live, DTensor):
        return local
    return DTensor.from_local(
        local, live.device_mesh, live.placements, run_check=False, shape=live.shape, stride=live.stride()
    )
