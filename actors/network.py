"""Which network interface has an address: gloo and NCCL want names, Ray knows addresses."""

from __future__ import annotations

import fcntl
import os
import socket
import struct

_SIOCGIFADDR = 0x8915  # linux/sockios.h


def interface_of(ip: str) -> str | None:
    """The name of this machine's interface with an IPv4 address; None where there is none."""
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


def use_interface_of(ip: str) -> None:
    """Make this process's gloo and NCCL groups use the interface that has ``ip``.

    Without it gloo takes the address that the host's name resolves to, often 127.0.0.1, and groups over several nodes
    can't form. What the user has set stands.
    """
    name = interface_of(ip)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
