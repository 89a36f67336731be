"""Join what the ranks' optimizers hold in memory: whole state and hyperparameters by parameter, to be compared bit for bit.

Read from the optimizers and joined by hand. Torch's own gathering would be no oracle: under FSDP1 it returns the
``exp_avg_sq`` of a parameter of one element for its ``exp_avg`` too (torch 2.13).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from tests.programs.net import Net

WholeState = dict[str, dict[str, Any]]  # FQN -> "state.exp_avg", "group.lr", ... -> value

_SHAPES = {fqn: parameter.shape for fqn, parameter in Net(0).named_parameters()}


def whole_state(model: nn.Module, optimizers: Optimizer | Iterable[Optimizer]) -> WholeState:
    """The state of all ranks, which lie along the first dimension in the order of the ranks."""
    ours = _local_state(model, [optimizers] if isinstance(optimizers, Optimizer) else optimizers)
    by_rank = [ours]
    if dist.is_initialized():
        by_rank = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(by_rank, ours)
    return {fqn: _joined(fqn, [local[fqn] for local in by_rank]) for fqn in ours}


def write_whole_state(model: nn.Module, optimizers: Optimizer | Iterable[Optimizer], path: str) -> None:
    """Write it to a file, from rank 0."""
    found = whole_state(model, optimizers)
    if dist.get_rank() == 0:
        torch.save(found, path)


def read_whole_state(path: Path) -> WholeState:
    """Read what `write_whole_state` wrote."""
    found: WholeState = torch.load(path, weights_only=True)
    return found


def check_same(found: WholeState, expected: WholeState) -> None:
    """Each value equals, in type, dtype, shape and bits."""
    assert found.keys() == expected.keys()
    for fqn, values in expected.items():
        assert found[fqn].keys() == values.keys(), fqn
        for name, value in values.items():
            _check_value(f"{fqn}: {name}", found[fqn][name], value)


def _local_state(model: nn.Module, optimizers: Iterable[Optimizer]) -> WholeState:
    fqns = {
        id(parameter): name.replace("_fsdp_wrapped_module.", "")
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    found: WholeState = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                values = {f"state.{name}": _local(value) for name, value in optimizer.state.get(parameter, {}).items()}
                values |= {f"group.{name}": group[name] for name in group if name not in ("params", "param_names")}
                found[fqns[id(parameter)]] = values
    return found


def _local(value: Any) -> Any:
    return value.to_local() if isinstance(value, DTensor) else value


def _joined(fqn: str, by_rank: list[dict[str, Any]]) -> dict[str, Any]:
    joined = {}
    for name in sorted({name for values in by_rank for name in values}):
        values = [values[name] for values in by_rank if name in values]  # FSDP1: no state where the slice is empty
        if isinstance(values[0], torch.Tensor) and values[0].ndim > 0:
            shape = _SHAPES[fqn.removeprefix("net.")]
            joined[name] = torch.cat([value.reshape(-1) for value in values]).view(shape)
        else:
            for value in values[1:]:
                _check_value(f"{fqn}: {name} of two ranks", value, values[0])
            joined[name] = values[0]
    return joined


def _check_value(what: str, found: Any, expected: Any) -> None:
    assert type(found) is type(expected), f"{what}: {found!r}, not {expected!r}"
    if not isinstance(expected, torch.Tensor):
        assert found == expected, what
        return
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), what
    ours, theirs = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (found, expected))
    assert torch.equal(ours, theirs), f"{what}: {found}, not {expected}"
