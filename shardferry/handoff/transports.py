"""All transports by name. The spec, the loader actors, the driver and the error messages take the names from here."""

from __future__ import annotations

from dataclasses import dataclass
from pkgutil import resolve_name

from shardferry.arena import Arena
from shardferry.errors import HandoffError
from shardferry.handoff.transport import Recipient, Transport

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class TransportEntry:
    """A transport, and what stages must know of it before its module is imported."""

    name: str  # in ``handoff.transport`` of a spec and in reports
    home: str  # "module:class"
    crosses_processes: bool = True  # False: no loaders, each trainer loads for itself
    needs_host_arena: bool = False
    keeps_on_device: bool = False  # an arena on a GPU reaches the trainer without a copy in host memory
    outlives_loader: bool = False  # the loader may end once the handle is made; else once it was opened
    asks_loader: bool = False  # a loader that does not answer delays the opener, until timeouts.handoff_s
    lends_memory: bool = False  # the recipient of an exclusive arena needs the loader as long as it uses the memory

    def load(self) -> type[Transport]:
        """The class. The first call imports its module."""
        found: type[Transport] = resolve_name(self.home)
        return found


# ``auto`` takes the first one that can carry the arena. A new transport is one more line.
TRANSPORTS = (
    TransportEntry(
        "in_process", "shardferry.handoff.in_process:InProcess", crosses_processes=False, keeps_on_device=True
    ),
    TransportEntry("shared_memory", "shardferry.handoff.shared_memory:SharedMemory", needs_host_arena=True),
    TransportEntry("cuda_ipc", "shardferry.handoff.cuda_ipc:CudaIpc", keeps_on_device=True, lends_memory=True),
    TransportEntry("object_store", "shardferry.handoff.object_store:ObjectStore", outlives_loader=True),
    # Below object_store, which carries every arena: ``auto`` never takes these.
    TransportEntry("collective", "shardferry.handoff.collective:Collective", keeps_on_device=True, asks_loader=True),
    TransportEntry("nixl", "shardferry.handoff.nixl:Nixl", keeps_on_device=True, asks_loader=True),
)


def stage_transport_names() -> tuple[str, ...]:
    """The values of ``handoff.transport`` in a stage's spec: ``auto``, and each transport."""
    return (AUTO, *(transport.name for transport in TRANSPORTS))


def transport_named(name: str) -> TransportEntry:
    """The transport of this name. Raises HandoffError: there is none; the message lists the names."""
    for transport in TRANSPORTS:
        if transport.name == name:
            return transport
    *names, last = (transport.name for transport in TRANSPORTS)
    raise HandoffError(f"{name!r} is not a transport; use {', '.join(names)} or {last}")


def choose_transport(name: str, arena: Arena, recipient: Recipient) -> TransportEntry:
    """The transport of this name; for ``auto``, the first one that can carry the arena to the recipient.

    Whether a transport that was asked for by name can carry the arena is not checked here; `Transport.from_arena` does.

    Raises:
        HandoffError: no transport has this name.
    """
    if name != AUTO:
        return transport_named(name)
    return next(transport for transport in TRANSPORTS if transport.load().can_carry(arena, recipient))


def needs_host_arena(name: str) -> bool:
    """Whether a transport, as a spec names it, carries arenas on the host alone; ``auto`` doesn't. Raises HandoffError."""
    return name != AUTO and transport_named(name).needs_host_arena


def wants_device_arena(name: str, recipient: Recipient, gpu: str | None) -> bool:
    """Whether a loader whose device is left to us fills an arena on its GPU; else it fills one on the host.

    An arena on a GPU is worth it only where no transport takes it through host memory.

    Args:
        name: of a transport, as a spec names it.
        gpu: the loader's, see `shardferry.arena.gpu_identity`; None where it has none.

    Raises:
        HandoffError: no transport has this name.
    """
    if name != AUTO:
        return gpu is not None and transport_named(name).keeps_on_device
    return gpu is not None and recipient.same_host and recipient.gpu == gpu
