"""Small models and their optimizers, wrapped in the ways that people wrap them, with state from the oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Placement, distribute_tensor

import shardferry
from tests.support.oracle import full_tensor

# Rows that divide evenly by up to 8, and 5, 7 and 30 rows that leave uneven and, at 6 and 8 ranks, empty shards.
SHAPES: Mapping[str, tuple[int, ...]] = {
    "even.weight": (48, 6),
    "even.bias": (48,),
    "five.weight": (5, 3),
    "seven.weight": (7, 11),
    "thirty.weight": (30, 4),
    "cube.weight": (9, 4, 5),
    "one.weight": (1,),
}
STATES = ("exp_avg", "exp_avg_sq")
STEP = 7.0
HYPERPARAMETERS = ({"lr": 0.125, "weight_decay": 0.5}, {"lr": 0.25, "weight_decay": 0.0})
OTHER = ({"lr": 9.0, "weight_decay": 9.0}, {"lr": 8.0, "weight_decay": 8.0})  # of the optimizers that are loaded into


class Model(nn.Module):
    """Parameters of the given shapes, under their dotted names."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> None:
        super().__init__()
        for fqn, shape in shapes.items():
            module, name = fqn.split(".")
            if module not in self._modules:
                self.add_module(module, nn.Module())
            getattr(self, module).register_parameter(name, nn.Parameter(full_tensor(fqn, "weight", shape)))

    def forward(self) -> torch.Tensor:
        return torch.stack([parameter.sum() for parameter in self.parameters()]).sum()


def adamw(model: nn.Module, hyperparameters: Sequence[Mapping[str, Any]] = HYPERPARAMETERS) -> torch.optim.Optimizer:
    """Two param groups: matrices, and everything else."""
    named = list(model.named_parameters())
    matrices = [p for n, p in named if len(_shape_of(n, p)) >= 2]
    others = [p for n, p in named if len(_shape_of(n, p)) < 2]
    groups = zip((matrices, others), hyperparameters, strict=True)
    return torch.optim.AdamW([{"params": params, **values} for params, values in groups if params])


def _shape_of(name: str, parameter: torch.Tensor) -> tuple[int, ...]:
    return SHAPES.get(name.replace("_fsdp_wrapped_module.", ""), tuple(parameter.shape))


def fsdp2(model: nn.Module) -> nn.Module:
    """FSDP2 over all ranks of the process group."""
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def fsdp1(model: nn.Module, *, use_orig_params: bool) -> nn.Module:
    """FSDP1 over all ranks of the process group."""
    return FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))


def distributed(
    model: nn.Module, mesh_shape: Sequence[int], placements: Mapping[str, Sequence[Placement]]
) -> nn.Module:
    """Parameters as DTensors on a mesh; those not named are left plain."""
    names = tuple(f"axis{axis}" for axis in range(len(mesh_shape)))
    mesh = init_device_mesh("cpu", tuple(mesh_shape), mesh_dim_names=names)
    for fqn, how in placements.items():
        module, name = fqn.split(".")
        parameter = getattr(getattr(model, module), name)
        sharded = distribute_tensor(parameter.detach(), mesh, list(how))
        getattr(model, module).register_parameter(name, nn.Parameter(sharded))
    return model


def fill_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter the oracle's AdamW state, lying as the parameter does."""
    for fqn, parameter in model.named_parameters():
        state: dict[str, Any] = {"step": torch.tensor(STEP)}
        for name in STATES:
            state[name] = like_parameter(parameter, full_tensor(fqn, name, parameter.shape))
        optimizer.state[parameter] = state


def like_parameter(parameter: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """The part of a whole tensor that this rank's parameter holds; torch's own DTensor code does the cutting."""
    if isinstance(parameter, DTensor):
        # Every rank has the whole: nothing has to be sent.
        return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return full.clone()


def save(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path | str) -> None:
    """Stock torch writes the checkpoint."""
    state_dict = {
        "model": get_model_state_dict(model),
        "optim": get_optimizer_state_dict(model, optimizer),
    }
    dcp.save(state_dict, checkpoint_id=str(path))


def save_fsdp2(path: str, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> None:
    """On each rank: an FSDP2 model with the oracle's state, saved by stock torch."""
    model = fsdp2(Model(shapes))
    optimizer = adamw(model)
    fill_state(model, optimizer)
    save(model, optimizer, path)


def save_one_group(path: str) -> None:
    """On each rank: the same, with all parameters in groups of equal hyperparameters."""
    model = fsdp2(Model())
    optimizer = adamw(model, (HYPERPARAMETERS[0], HYPERPARAMETERS[0]))
    fill_state(model, optimizer)
    save(model, optimizer, path)


def check_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Compare every element of AdamW's state with the oracle, bitwise; returns how many elements this rank compared."""
    compared = 0
    for fqn, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        assert float(state["step"]) == STEP, f"{fqn}: step {state['step']}"
        for name in STATES:
            expected = like_parameter(parameter, full_tensor(fqn, name, parameter.shape))
            found, wanted = _local(state[name]), _local(expected)
            assert type(state[name]) is type(expected), f"{fqn}.{name}: {type(state[name])}"
            assert found.shape == wanted.shape, f"{fqn}.{name}: {found.shape} {wanted.shape}"
            assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8)), f"{fqn}.{name} differs"
            compared += found.numel()
    return compared


def load_fsdp2(path: str) -> int:
    """On each rank: load into an FSDP2 model and compare; returns how many elements."""
    model = fsdp2(Model())
    optimizer = adamw(model, OTHER)
    shardferry.load_optimizer_state(model, optimizer, path)
    check_groups(optimizer)
    return check_state(model, optimizer)


def load_plain(path: str | Path) -> int:
    """Load into a model that nothing wraps and compare; returns how many elements."""
    model = Model()
    optimizer = adamw(model, OTHER)
    shardferry.load_optimizer_state(model, optimizer, path)
    check_groups(optimizer)
    return check_state(model, optimizer)


def check_groups(optimizer: torch.optim.Optimizer) -> None:
    """Hyperparameters are those that were saved."""
    for group, expected in zip(optimizer.param_groups, HYPERPARAMETERS, strict=True):
        assert {name: group[name] for name in expected} == dict(expected)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.contiguous().view(-1)
