"""Reach a memory file of a loader's process from another process of its node."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from shardferry.arena import SEAL_FUTURE_WRITE, HostArena, host_identity, open_memory_file
from shardferry.errors import HandoffError

_TAKEN = "this shard was handed over already, and the trainer that has it may have changed it; load again"


@dataclass(frozen=True, slots=True)
class LoaderFile:
    """The address of a memory file that a loader holds. It can be opened as long as the loader's process lives."""

    host: str  # see `shardferry.arena.host_identity`
    pid: int
    descriptor: int
    inode: int

    @classmethod
    def of(cls, arena: HostArena) -> Self:
        """Of an arena of this process."""
        return cls(host_identity(), os.getpid(), arena.descriptor, os.fstat(arena.descriptor).st_ino)

    @contextmanager
    def opened(self) -> Iterator[int]:
        """A descriptor of the file, open until the end of the ``with``.

        Raises:
            HandoffError: the file is on another node, its loader has ended, or a trainer has taken it.
        """
        if self.host != host_identity():
            raise HandoffError(
                "this shard is in the memory of another node or container than the trainer's; "
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
            if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SEAL:  # see `take`
                raise HandoffError(_TAKEN)
            yield descriptor
        except PermissionError:  # another process took it meanwhile
            raise HandoffError(_TAKEN) from None
        finally:
            os.close(descriptor)


def take(descriptor: int) -> None:
    """Refuse an opened file to all who map it from now on. Raises PermissionError: another process has been quicker."""
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL)
