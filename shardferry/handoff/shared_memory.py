"""Hand an arena over to a process of the same node, which maps the loader's memory file."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Self

import torch

from shardferry.arena import Arena, HostArena
from shardferry.errors import HandoffError
from shardferry.handoff.loader_file import LoaderFile, take
from shardferry.handoff.transport import Recipient, Transport


@dataclass(frozen=True, slots=True)
class SharedMemory(Transport):
    """The address of an anonymous memory file that the loader holds. Opening it takes O(1) time and copies nothing.

    An exclusive arena is sealed against further writable mappings when it is opened, so that a second opener is refused.
    Openers of any other arena get private pages: the kernel copies each page that an opener writes to.
    """

    file: LoaderFile
    nbytes: int
    exclusive: bool

    @classmethod
    def can_carry(cls, arena: Arena, recipient: Recipient) -> bool:
        return recipient.same_host and isinstance(arena, HostArena) and arena.is_shareable

    @classmethod
    def from_arena(cls, arena: Arena, *, exclusive: bool) -> Self:
        """Unmap the arena here; freeze it unless one trainer gets it. This process must live until it was opened."""
        if not isinstance(arena, HostArena):
            raise HandoffError(
                f"shared_memory needs an arena on the host, this one is on {arena.device}; use device: cpu"
            )
        if not arena.is_shareable:
            raise HandoffError("this shard was loaded for its own process alone; use in_process")
        if exclusive:
            arena.detach()
        else:
            arena.freeze()
        return cls(LoaderFile.of(arena), arena.nbytes, exclusive)

    def open(self) -> torch.Tensor:
        with self.file.opened() as descriptor:
            flags = mmap.MAP_SHARED if self.exclusive else mmap.MAP_PRIVATE
            pages = mmap.mmap(descriptor, self.nbytes, flags, mmap.PROT_READ | mmap.PROT_WRITE)
            if self.exclusive:
                take(descriptor)
        return torch.frombuffer(pages, dtype=torch.uint8)
