"""The interface of a transport: one way for a sealed arena to get from the loader's process to the trainer's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

import torch

from shardferry.arena import Arena
from shardferry.errors import HandoffError


@dataclass(frozen=True, slots=True)
class Recipient:
    """The process that will open a shard, as seen from the process that holds the arena."""

    same_host: bool  # same machine and process namespace, see `shardferry.arena.host_identity`
    same_process: bool = False
    gpu: str | None = None  # of its model, see `shardferry.arena.gpu_identity`; None: none, or not known


_TRAINERS_SHARE = 0.9  # of timeouts.handoff_s


@dataclass(frozen=True, slots=True)
class Route:
    """What a stage knows of the way of one shard: for transports that ask the loader, and for their errors."""

    world_rank: int | None = None
    node: str = "127.0.0.1"  # address of the loader's node
    timeout_s: float = 600.0  # timeouts.handoff_s

    @property
    def trainers_s(self) -> float:
        """What a trainer waits: less than the stage, which waits for the trainer, and whose error tells less."""
        return _TRAINERS_SHARE * self.timeout_s

    def who(self, pid: int) -> str:
        """The loader, for a message."""
        rank = "" if self.world_rank is None else f"rank {self.world_rank} on {self.node}: "
        return f"{rank}the loader (process {pid}) that held this shard"

    def ended(self, pid: int, why: object) -> HandoffError:
        """The error where the loader is gone."""
        return HandoffError(
            f"{self.who(pid)} has ended before the shard was opened, or its node {self.node} can't be reached ({why}); "
            "keep the stage's result until all trainers have opened their handles"
        )

    def late(self, pid: int) -> HandoffError:
        """The error where the loader says nothing in time."""
        return HandoffError(
            f"{self.who(pid)} has not sent it within {self.trainers_s:g} s, nine tenths of timeouts.handoff_s = "
            f"{self.timeout_s:g} s; is its process or its node stopped?"
        )


class Transport(ABC):
    """One arena on its way to a trainer. It is pickled as a part of a `ShardHandle`.

    A new transport is a subclass in a file of its own, and one line in `transports.py`.
    """

    __slots__ = ()

    @classmethod
    @abstractmethod
    def can_carry(cls, arena: Arena, recipient: Recipient) -> bool:
        """Whether this transport can bring this arena to this recipient; ``auto`` asks."""

    @classmethod
    @abstractmethod
    def from_arena(cls, arena: Arena, *, exclusive: bool) -> Self:
        """Seal an arena of this process and make it ready to be opened elsewhere.

        Args:
            arena: filled. Nobody may write to it afterwards but the recipient of an exclusive one.
            exclusive: one recipient gets the arena itself, and nobody else may open it. Otherwise many may open it, and the
                writes of one are not seen by another. Transports that copy the bytes give each recipient a copy in both cases.

        Raises:
            HandoffError: this transport can't carry the arena.
        """

    @classmethod  # noqa: B027 (most need nothing)
    def require(cls) -> None:
        """Raise HandoffError where this process lacks an optional package; a loader asks before it reads."""

    def along(self, route: Route) -> Self:
        """The same, with what the stage knows of its way; transports that need nothing of it stay as they are."""
        return self

    @abstractmethod
    def open(self) -> torch.Tensor:
        """The arena's bytes in this process: one dimension of uint8, writable.

        Raises:
            HandoffError: the bytes can't be reached from here, or not any more.
        """
