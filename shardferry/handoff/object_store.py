"""Hand an arena over as a copy of its bytes, through an object store such as Ray's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from shardferry.arena import Arena
from shardferry.handoff.transport import Recipient, Transport

CHUNK_BYTES = 256 << 20  # of one object: a reader needs room for one more than it copies, and pulls several at a time


def as_they_are(chunks: Sequence[Any]) -> Sequence[np.ndarray]:
    """Chunks that are arrays already."""
    return chunks


@dataclass(frozen=True, slots=True)
class ObjectStore(Transport):
    """The arena's bytes in chunks. NumPy pickles them out of band, so that an object store copies them once."""

    chunks: tuple[Any, ...]  # arrays of uint8, or what ``fetch`` makes arrays of
    nbytes: int
    fetch: Callable[[Sequence[Any]], Sequence[np.ndarray]] = as_they_are  # raises HandoffError

    @classmethod
    def can_carry(cls, arena: Arena, recipient: Recipient) -> bool:
        return True

    @classmethod
    def from_arena(cls, arena: Arena, *, exclusive: bool) -> Self:
        return cls(chunks_of(arena), arena.nbytes)

    def open(self) -> torch.Tensor:
        """A copy: others share the bytes in the object store, which are read-only."""
        memory, end = torch.empty(self.nbytes, dtype=torch.uint8), 0
        for chunk in self.chunks:
            (data,) = self.fetch([chunk])
            memory.numpy()[end : end + data.nbytes] = data
            end += data.nbytes
        return memory


def chunks_of(arena: Arena) -> tuple[np.ndarray, ...]:
    """The arena's bytes as arrays of at most `CHUNK_BYTES`."""
    data = arena.as_bytes().cpu().numpy()
    return tuple(data[start : start + CHUNK_BYTES] for start in range(0, data.nbytes, CHUNK_BYTES))


def num_chunks(nbytes: int) -> int:
    """Of an arena of this size."""
    return len(range(0, nbytes, CHUNK_BYTES))
