"""Checkpoints to load: an FSDP2 model with AdamW state, saved by stock ``dcp.save`` from real ranks."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from benchmarks.models import LEARNING_RATE, STATES, STEP, Shapes, fill_box
from shardferry.region import Region

OPTIMIZER_KEY = "optim"


def make_model(shapes: Shapes) -> nn.Module:
    """A module tree with parameters of these names and shapes, on the meta device."""
    root = nn.Module()
    for fqn, shape in shapes.items():
        *path, name = fqn.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(name, nn.Parameter(torch.empty(shape, device="meta")))
    return root


def shard_model(shapes: Shapes) -> nn.Module:
    """The model under FSDP2 over all ranks of the process group: each block on its own, then the rest. Not filled."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = make_model(shapes)
    for block in getattr(model, "h", nn.Module()).children():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model.to_empty(device="cpu")


def adamw(parameters: Mapping[str, torch.Tensor]) -> torch.optim.AdamW:
    """Two param groups: matrices, and everything else."""
    matrices = [parameter for parameter in parameters.values() if parameter.ndim >= 2]
    others = [parameter for parameter in parameters.values() if parameter.ndim < 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=LEARNING_RATE
    )


def save_checkpoint(path: str, shapes: Shapes) -> None:
    """On each rank: make the sharded model and its AdamW state, and let stock torch save both."""
    model, optimizer = sharded_state(shapes)
    state_dict = {"model": get_model_state_dict(model), OPTIMIZER_KEY: get_optimizer_state_dict(model, optimizer)}
    dcp.save(state_dict, checkpoint_id=path)


def sharded_state(shapes: Shapes) -> tuple[nn.Module, torch.optim.Optimizer]:
    """On each rank: the sharded model and its optimizer, filled."""
    model = shard_model(shapes)
    parameters = dict(model.named_parameters())
    optimizer = adamw(parameters)
    for fqn, parameter in parameters.items():
        _fill(parameter, fqn, "weight")
        state: dict[str, Any] = {"step": torch.tensor(STEP)}
        for name in STATES:
            state[name] = torch.empty_like(parameter, requires_grad=False)
            _fill(state[name], fqn, name)
        optimizer.state[parameter] = state
    return model, optimizer


def _fill(tensor: torch.Tensor, fqn: str, name: str) -> None:
    assert isinstance(tensor, DTensor)
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    fill_box(tensor.to_local().detach(), fqn, name, tensor.shape, Region(tuple(offsets), tuple(sizes)))


def data_files(path: str) -> list[Path]:
    """The checkpoint's data files, sorted."""
    return sorted(Path(path).glob("*.distcp"))


def disk_directory(wanted: str | None, needed_bytes: int) -> str:
    """Where checkpoints can lie on a disk: not in memory, where reading would be something else.

    Raises:
        ValueError: the directory is in memory or too small.
    """
    candidates = [wanted] if wanted else [tempfile.gettempdir(), "/var/tmp", str(Path.home())]
    for directory in candidates:
        if Path(directory).is_dir() and file_system(directory) not in ("tmpfs", "ramfs"):
            room = os.statvfs(directory)
            free = room.f_bavail * room.f_frsize
            if free >= needed_bytes:
                return directory
    raise ValueError(
        f"none of {', '.join(candidates)} is on a disk with {math.ceil(needed_bytes / 1e6)} MB free; "
        "name one with --directory"
    )


def file_system(directory: str) -> str:
    """The kind of file system that holds a directory: ``ext4``."""
    real = os.path.realpath(directory)
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    holding = [
        (len(point), kind) for point, kind in mounts if real == point or real.startswith(point.rstrip("/") + "/")
    ]
    return max(holding)[1] if holding else "unknown"
