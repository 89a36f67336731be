"""Hand an arena over to a process of the same node, which maps the loader's memory file."""

from __future__ import annotations

import fcntl
import mmap
import os
from dataclasses import dataclass
from typing import Self

import torch

from shardferry.arena import Arena, HostArena, host_identity, open_memory_file
from shardferry.errors import HandoffError
from shardferry.handoff.transport import Recipient, Transport

_F_SEAL_FUTURE_WRITE = 0x0010  # linux/fcntl.h; not in the fcntl module


@dataclass(frozen=True, slots=True)
class SharedMemory(Transport):
    """The address of an anonymous memory file that the loader holds. Opening it takes O(1) time and copies nothing.

    An exclusive arena is sealed against further writable mappings when it is opened, so that a second opener is refused.
    Openers of any other arena get private pages: the kernel copies each page that an opener writes to.
    """

    host: str  # see `shardferry.arena.host_identity`
    pid: int
    descriptor: int
    inode: int
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
        return cls(
            host=host_identity(),
            pid=os.getpid(),
            descriptor=arena.descriptor,
            inode=os.fstat(arena.descriptor).st_ino,
            nbytes=arena.nbytes,
            exclusive=exclusive,
        )

    def open(self) -> torch.Tensor:
        if self.host != host_identity():
            raise HandoffError(
                "this shard is in the shared memory of another node or container than the trainer's; "
                "place the trainer on the loader's node, or use handoff.transport: object_store"
            )
        try:
            descriptor = open_memory_file(self.pid, self.descriptor, self.inode)
        except OSError as error:
            raise HandoffError(
                f"the loader (process {self.pid}) that held this shard has ended before the shard was opened; "
                f"keep the stage's result until all trainers have opened their handles ({error})"
            ) from error
        try:
            if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _F_SEAL_FUTURE_WRITE:
                raise HandoffError(
                    "this shard was handed over already, and the trainer that has it may have changed it; load again"
                )
            flags = mmap.MAP_SHARED if self.exclusive else mmap.MAP_PRIVATE
            pages = mmap.mmap(descriptor, self.nbytes, flags, mmap.PROT_READ | mmap.PROT_WRITE)
            if self.exclusive:
                fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)
        finally:
            os.close(descriptor)
        return torch.frombuffer(pages, dtype=torch.uint8)
