"""Make a handle on a loaded arena, and open it where the trainer runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.nn import Module
from torch.optim import Optimizer

from shardferry.arena import Arena
from shardferry.handoff.transport import Transport
from shardferry.handoff.transports import transport_named
from shardferry.optimizer.install import Checked, load_into
from shardferry.optimizer.live import LiveModel
from shardferry.optimizer.loaded_state import LoadedState
from shardferry.plan.load_plan import Manifest


class Shard(LoadedState):
    """One rank's loaded optimizer state, opened. Tensors taken from it keep the memory alive, also after the ``with``."""

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def load_into(self, model: Module | Sequence[Module], optimizer: Optimizer | Sequence[Optimizer]) -> Checked:
        """Replace state, hyperparameters and, where they were loaded, weights; see `shardferry.optimizer.install.load_into`.

        Args:
            model, optimizer: one each, or several where a rank has several.

        Returns:
            The hyperparameters that were overwritten, the state entries that only one side has, and warnings.

        Raises:
            InstallError: the shard was loaded for other regions than the model's parameters hold, or lacks one of them, or is
                another optimizer's. Nothing was changed.
            LayoutError: the layout of a parameter is not supported.
        """
        return load_into(self, LiveModel.of(model, optimizer))


@dataclass(frozen=True)
class ShardHandle:
    """One rank's loaded optimizer state, to be opened in the trainer's process. Picklable."""

    manifest: Manifest
    transport: str  # its name
    source: Transport = field(repr=False)
    others: tuple[ShardHandle, ...] = ()  # the state of the rank's other optimizers, where they have keys of their own
    held: Any = field(default=None, repr=False)  # what must live until the shard is opened: a reference to its loader

    @property
    def parts(self) -> tuple[ShardHandle, ...]:
        """This one and the others."""
        return (self, *self.others)

    @property
    def world_rank(self) -> int:
        """The rank whose state this is."""
        return self.manifest.world_rank

    def open(self) -> Shard:
        """Map or copy the arena into this process; use the result as a context manager.

        Raises:
            HandoffError: the arena is on another node, its loader has ended, or another trainer has taken it.
        """
        return Shard(self.manifest, self.source.open())


def make_handle(
    manifest: Manifest, arena: Arena, transport: str, *, exclusive: bool, lend: bool = False
) -> ShardHandle:
    """Seal a loaded arena and make a handle for its trainer.

    Args:
        manifest: of the arena.
        arena: filled.
        transport: name of a transport, see `shardferry.handoff.transports.TRANSPORTS`; not ``auto``.
        exclusive: one trainer gets the arena itself, and nobody else may open it. Otherwise the arena is frozen, and
            each opener gets private pages where it writes.
        lend: this process will live until the trainer of an exclusive arena uses its memory no more. Otherwise a transport that
            would lend memory gives a copy.

    Raises:
        HandoffError: no transport has this name, or it can't carry this arena.
    """
    entry = transport_named(transport)
    source = entry.load().from_arena(arena, exclusive=exclusive and (lend or not entry.lends_memory))
    return ShardHandle(manifest, transport, source)
