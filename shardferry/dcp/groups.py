"""Say which ranks a process group has, and where its tensors live."""

from __future__ import annotations

import torch
import torch.distributed as dist


def world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None, "torch.distributed is not initialised"
    return world


def device_type_of(group: dist.ProcessGroup) -> str:
    """Where a group's tensors live: on GPUs where it can send them, also when it can send host memory too."""
    return "cuda" if "nccl" in dist.get_backend(group) and torch.cuda.is_available() else "cpu"


def device_of(group: dist.ProcessGroup) -> torch.device:
    if device_type_of(group) == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
