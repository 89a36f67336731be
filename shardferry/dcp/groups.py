"""Say which process group a call is about, which ranks it has, and where its tensors live."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from shardferry.errors import SpecError


def group_of_call(process_group: Any) -> dist.ProcessGroup:
    """The group that was given, or the whole job.

    Raises:
        SpecError: there is no group, this rank is not in it, or it is something else.
    """
    if process_group is None:
        return world()
    if process_group is dist.GroupMember.NON_GROUP_MEMBER:
        raise SpecError(
            f"process_group: rank {dist.get_rank()} of the job is not in it; call on the ranks that the group was made of"
        )
    if not isinstance(process_group, dist.ProcessGroup):
        raise SpecError(f"process_group: is a {type(process_group).__name__}, not a ProcessGroup")
    return process_group


def world() -> dist.ProcessGroup:
    """The whole job. Raises SpecError where torch.distributed is not initialised."""
    group = dist.group.WORLD if dist.is_initialized() else None
    if group is None:
        raise SpecError(
            "torch.distributed is not initialised, and sharded tensors need a process group; "
            "call torch.distributed.init_process_group first (a group of one process will do)"
        )
    return group


def device_type_of(group: dist.ProcessGroup) -> str:
    """Where a group's tensors live: on GPUs where it can send them, also when it can send host memory too."""
    return "cuda" if "nccl" in dist.get_backend(group) and torch.cuda.is_available() else "cpu"


def device_of(group: dist.ProcessGroup) -> torch.device:
    """This rank's device."""
    if device_type_of(group) == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
