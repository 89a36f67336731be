"""What the reader asks of a storage, and which storage a location names."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from shardferry.errors import CheckpointNotFound
from shardferry.storage.runs import Runs


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a file, of which only some runs may be looked at, and what it cost."""

    view: memoryview  # read-only; from the first run's start to the last one's stop
    num_requests: int
    bytes_requested: int


class ByteSource(Protocol):
    """Reads byte ranges of files. Safe to use from several threads."""

    def read_into(self, path: str, byte_offset: int, buffer: memoryview) -> None:
        """Fill the buffer from ``byte_offset`` on. Raises StorageError where the file has fewer bytes."""

    def window(self, path: str, runs: Runs) -> AbstractContextManager[Window]:
        """The bytes of some runs, in place, valid inside the ``with``. Raises StorageError where the file has fewer bytes.

        Where the storage can, nothing is fetched before it is looked at. Else the runs are fetched, with the gaps between
        them as far as these are small.
        """


class RangeReader(ByteSource, Protocol):
    """The files of one checkpoint."""

    location: str

    def names(self) -> list[str]:
        """Names of the files directly in the checkpoint, sorted."""

    def size(self, path: str) -> int:
        """Bytes of a file. Raises StorageError where it is missing."""

    def close(self) -> None:
        """Give back files and connections."""


def open_storage(location: str | Path) -> RangeReader:
    """The storage of a checkpoint: a directory, as a path or a ``file://`` URL.

    Raises:
        CheckpointNotFound: no such directory, or a kind of URL that isn't supported.
    """
    from shardferry.storage.local import LocalReader

    text = str(location)
    parts = urlsplit(text)
    if parts.scheme == "file":
        return LocalReader(Path(unquote(parts.path)))
    if "://" in text:
        raise CheckpointNotFound(
            f"{text}: checkpoints are read from directories and file:// URLs, not from {parts.scheme}://"
        )
    return LocalReader(Path(text))


def read_file(storage: RangeReader, path: str) -> bytes:
    """A whole (small) file."""
    data = bytearray(storage.size(path))
    storage.read_into(path, 0, memoryview(data))
    return bytes(data)
