"""What the reader asks of a storage, and which storage a location names."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from shardferry.errors import CheckpointNotFound


class RangeReader(Protocol):
    """Reads byte ranges of the files of one checkpoint. Safe to use from several threads."""

    location: str

    def names(self) -> list[str]:
        """Names of the files directly in the checkpoint, sorted."""

    def size(self, path: str) -> int:
        """Bytes of a file. Raises StorageError where it is missing."""

    def read_into(self, path: str, byte_offset: int, buffer: memoryview) -> None:
        """Fill the buffer from ``byte_offset`` on. Raises StorageError where the file has fewer bytes."""

    def window(self, path: str, *, start: int, stop: int) -> AbstractContextManager[memoryview]:
        """The bytes ``start`` to ``stop`` (exclusive), read-only, valid inside the ``with``.

        Where the storage can, nothing is fetched before it is looked at, so that looking at a few runs of a wide window
        costs these runs.
        """

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
