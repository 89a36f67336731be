"""Form a process group of loaders: rank 0 opens a store on a port of the kernel's choice and tells the others."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the ranks of one stage meet."""

    ip: str
    port: int
    generation: str  # keys of different stages in one store don't mix


def open_meeting(ip: str, generation: str, timeout_s: float) -> tuple[Meeting, dist.TCPStore]:
    """On rank 0: a store that others can join. It must be kept as long as the process group.

    Port 0 lets the kernel choose, so that no other process can take the port between choosing and listening.
    """
    store = dist.TCPStore(
        ip, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s), use_libuv=True
    )
    return Meeting(ip, store.port, generation), store


def join_meeting(
    meeting: Meeting,
    *,
    own_store: dist.TCPStore | None,
    world_rank: int,
    world_size: int,
    device: torch.device,
    join_timeout_s: float,
    collective_timeout_s: float,
) -> dist.TCPStore:
    """Join the process group. Returns the store, which must be kept.

    It carries host memory (gloo), in which ranks agree and read for each other; where there are GPUs, theirs too (NCCL).
    """
    store = own_store or dist.TCPStore(
        meeting.ip, meeting.port, is_master=False, timeout=timedelta(seconds=join_timeout_s), use_libuv=True
    )
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(meeting.generation, store),
        rank=world_rank,
        world_size=world_size,
        timeout=timedelta(seconds=collective_timeout_s),
    )
    return store
