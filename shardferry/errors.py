"""Every error that Shardferry raises on purpose, as one tree.

* ShardferryError
  + SpecError               what people wrote can't be done                  (ValueError)
  + CatalogError            the checkpoint's metadata can't be used          (ValueError)
    - CheckpointNotFound    there is no checkpoint at this location          (FileNotFoundError)
    - UnsafeMetadata        the metadata asks for something that we refuse
  + LayoutError             the wanted topology is impossible                (ValueError)
  + PlanError               checkpoint and wanted topology don't fit         (ValueError)
  + StorageError            bytes are missing, short or unreadable           (OSError)
    - MissingFile           a file is not there                              (FileNotFoundError)
    - DecodeError           a saved item is not what the metadata says
  + ArenaError              no room for a rank's arena                       (MemoryError)
  + InstallError            the loaded state doesn't fit the live optimizer  (ValueError)
  + HandoffError            a shard can't be handed to this trainer          (RuntimeError)
  + RankError               a rank failed, died or is late; names the rank   (RuntimeError)
  + LoadCancelled           the load was cancelled                           (RuntimeError)

Each message says what is wrong, where, the two numbers that disagree, and the way out. Every class is made from one
message, so that it survives pickling between processes; those with more fields define ``__reduce__``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence


class ShardferryError(Exception):
    """Base of all errors raised on purpose by Shardferry."""


class SpecError(ShardferryError, ValueError):
    """A stage's spec is wrong or asks for more than the cluster has."""


class CatalogError(ShardferryError, ValueError):
    """The checkpoint's metadata is unreadable or contradicts itself."""


class CheckpointNotFound(CatalogError, FileNotFoundError):
    """There is no completed checkpoint at the location."""

    def __str__(self) -> str:
        return str(self.args[0])


class UnsafeMetadata(CatalogError):
    """The metadata names a forbidden global or a path outside the checkpoint."""


class LayoutError(ShardferryError, ValueError):
    """A mesh, a rule or a live tensor describes a layout that can't exist or isn't supported."""


class PlanError(ShardferryError, ValueError):
    """What the checkpoint holds can't fill what a rank wants, exactly once."""


class StorageError(ShardferryError, OSError):
    """A file is missing, shorter than the metadata says, or can't be read."""


class MissingFile(StorageError, FileNotFoundError):
    """A file that the metadata names is not there."""


class DecodeError(StorageError):
    """A saved item is damaged or is not what the metadata says it is."""


class ArenaError(ShardferryError, MemoryError):
    """A rank's arena doesn't fit into the memory of its host or GPU."""


class InstallError(ShardferryError, ValueError):
    """The loaded state doesn't fit the live model and optimizer."""


class HandoffError(ShardferryError, RuntimeError):
    """A shard can't be opened or delivered where it was asked for."""


class RankError(ShardferryError, RuntimeError):
    """One or more ranks failed, died or were late.

    Attributes:
        world_ranks: the ranks that failed, ascending.
    """

    def __init__(self, message: str, world_ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.world_ranks = tuple(world_ranks)

    def __reduce__(self) -> tuple[type[RankError], tuple[str, tuple[int, ...]]]:
        return type(self), (str(self.args[0]), self.world_ranks)


class LoadCancelled(ShardferryError, RuntimeError):
    """The load was cancelled by its user."""


def without_terminal_codes(text: str) -> str:
    """The words of another program's error, for a message of ours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)
