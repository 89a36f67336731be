"""All transports by name. The spec, the loader actors, the driver and the error messages take the names from here."""

from __future__ import annotations

from shardferry.arena import Arena
from shardferry.errors import HandoffError
from shardferry.handoff.in_process import InProcess
from shardferry.handoff.object_store import ObjectStore
from shardferry.handoff.shared_memory import SharedMemory
from shardferry.handoff.transport import Recipient, Transport

# ``auto`` takes the first one that can carry the arena. A new transport is one more line.
TRANSPORTS: tuple[type[Transport], ...] = (
    InProcess,
    SharedMemory,
    ObjectStore,
)
AUTO = "auto"


def stage_transport_names() -> tuple[str, ...]:
    """The values of ``handoff.transport`` in a stage's spec: ``auto``, and each transport that crosses processes."""
    return (AUTO, *(transport.name for transport in TRANSPORTS if transport.crosses_processes))


def transport_named(name: str) -> type[Transport]:
    """The transport of this name. Raises HandoffError: there is none; the message lists the names."""
    for transport in TRANSPORTS:
        if transport.name == name:
            return transport
    *names, last = (transport.name for transport in TRANSPORTS)
    raise HandoffError(f"{name!r} is not a transport; use {', '.join(names)} or {last}")


def choose_transport(name: str, arena: Arena, recipient: Recipient) -> type[Transport]:
    """The transport of this name; for ``auto``, the first one that can carry the arena to the recipient.

    Whether a transport that was asked for by name can carry the arena is not checked here; `Transport.from_arena` does.

    Raises:
        HandoffError: no transport has this name.
    """
    if name != AUTO:
        return transport_named(name)
    return next(transport for transport in TRANSPORTS if transport.can_carry(arena, recipient))


def needs_host_arena(name: str) -> bool:
    """Whether a transport, as a spec names it, carries arenas on the host alone; ``auto`` doesn't. Raises HandoffError."""
    return name != AUTO and transport_named(name).needs_host_arena
