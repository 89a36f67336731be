"""Hand an arena over within the process that loaded it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch

from shardferry.arena import Arena
from shardferry.errors import HandoffError
from shardferry.handoff.transport import Recipient, Transport


@dataclass(frozen=True, slots=True)
class InProcess(Transport):
    """The arena of this process. No copy; it can't be pickled."""

    arena: Arena

    @classmethod
    def can_carry(cls, arena: Arena, recipient: Recipient) -> bool:
        return recipient.same_process

    @classmethod
    def from_arena(cls, arena: Arena, *, exclusive: bool) -> Self:
        """The arena as it is; all who open it in this process share it."""
        return cls(arena)

    def open(self) -> torch.Tensor:
        return self.arena.as_bytes()

    def __reduce__(self) -> Any:
        raise HandoffError(
            "an in-process shard can't leave its process; use handoff.transport: shared_memory or object_store"
        )
