"""What the reader asks of a storage, and which storage a location names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from shardferry.storage.runs import Runs


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a file, of which only some runs may be looked at, and what it cost."""

    view: memoryview  # to read from, as long as it is held; from the first run's start to the last one's stop
    num_requests: int
    bytes_requested: int


class ByteSource(Protocol):
    """Reads byte ranges of files. Safe to use from several threads."""

    def read_into(self, path: str, byte_offset: int, buffer: memoryview) -> None:
        """Fill the buffer from ``byte_offset`` on. Raises StorageError where the file has fewer bytes."""

    def window(self, path: str, runs: Runs) -> Window:
        """The bytes of some runs, in place. Raises StorageError where the file has fewer bytes.

        Where the storage can, nothing is fetched before it is looked at. Else the runs are fetched, with the gaps between
        them as far as these are small.
        """


class RangeReader(ByteSource, Protocol):
    """The files of one checkpoint."""

    location: str

    def listing(self) -> dict[str, int | None]:
        """The files directly in the checkpoint: their bytes (None: not told), by name, ascending."""

    def size(self, path: str) -> int:
        """Bytes of a file. Raises StorageError where it is missing."""

    def close(self) -> None:
        """Give back files and connections."""


def open_storage(location: str | Path, storage_options: Mapping[str, Any] | None = None) -> RangeReader:
    """The storage of a checkpoint: a directory, as a path or a ``file://`` URL, or any URL that fsspec can open.

    Args:
        storage_options: for fsspec: credentials, an endpoint. A directory needs none.

    Raises:
        CheckpointNotFound: no such directory, or a kind of URL that isn't known or whose package isn't installed.
    """
    from shardferry.storage.local import LocalReader

    text = str(location)
    if "://" not in text:
        return LocalReader(Path(text))
    parts = urlsplit(text)
    if parts.scheme == "file":
        return LocalReader(Path(unquote(parts.path)))
    from shardferry.storage.remote import open_url

    return open_url(text, storage_options or {})


def read_file(storage: RangeReader, path: str) -> bytes:
    """A whole (small) file."""
    data = bytearray(storage.size(path))
    storage.read_into(path, 0, memoryview(data))
    return bytes(data)
