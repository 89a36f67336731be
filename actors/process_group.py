"""Form the loaders' process group: rank 0 opens a store on a free port, and the other ranks connect to it.

gloo and NCCL find network interfaces by name, Ray knows addresses: `use_interface_of` gives them the name.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

_SIOCGIFADDR = 0x8915  # linux/sockios.h


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the ranks of one stage meet."""

    ip: str
    port: int
    generation: str  # prefix of the keys, so that keys of different stages in one store differ


def open_rendezvous(ip: str, generation: str, timeout_s: float) -> tuple[Rendezvous, dist.TCPStore]:
    """On rank 0: open a store that the other ranks can join. The store must live as long as the process group.

    The kernel chooses the port when the store starts to listen, so that no other process can take it in between.
    """
    store = dist.TCPStore(
        ip, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s), use_libuv=True
    )
    return Rendezvous(ip, store.port, generation), store


def join_process_group(
    rendezvous: Rendezvous,
    *,
    own_store: dist.TCPStore | None,
    world_rank: int,
    world_size: int,
    device: torch.device,
    join_timeout_s: float,
    collective_timeout_s: float,
) -> dist.TCPStore:
    """Join the process group. It has gloo for host memory, and NCCL for GPU memory where ``device`` is a GPU.

    Args:
        own_store: the store that this rank opened; None on all ranks but 0.

    Returns:
        The store, which must live as long as the process group.

    Raises:
        torch.distributed.DistError: the other ranks did not join within ``join_timeout_s``.
    """
    store = own_store or dist.TCPStore(
        rendezvous.ip, rendezvous.port, is_master=False, timeout=timedelta(seconds=join_timeout_s), use_libuv=True
    )
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(rendezvous.generation, store),
        rank=world_rank,
        world_size=world_size,
        timeout=timedelta(seconds=collective_timeout_s),
    )
    return store


def use_interface_of(ip: str) -> None:
    """Make this process's gloo and NCCL groups use the network interface that has the address ``ip``.

    By default gloo takes the address to which the host's name resolves, often 127.0.0.1, and groups over several nodes
    can't form. Environment variables that the user has set stay.
    """
    name = interface_of(ip)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def interface_of(ip: str) -> str | None:
    """The name of this machine's interface with an IPv4 address; None if no interface has it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, request)
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == ip:
                return name
    return None
