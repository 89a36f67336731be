"""What the reader asks of a storage, and which storage a location names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import unquote, urlsplit

import numpy as np

from shardferry.errors import MissingFile, StorageError
from shardferry.storage.runs import Runs
from shardferry.storage.traits import StorageTraits

if TYPE_CHECKING:
    from shardferry.storage.retrying import RetryPolicy


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

    @property
    def traits(self) -> StorageTraits:
        """How this kind of storage is best read."""

    def listing(self) -> dict[str, int | None]:
        """The files directly in the checkpoint: their bytes (None: not told), by name, ascending.

        Raises:
            CheckpointNotFound: no such directory.
            StorageError: the storage can't list (see ``traits.has_listing``), or failed.
        """

    def versions(self) -> dict[str, str]:
        """What will be different once a file is written again, an etag say: as the last listing told, by name."""

    def expect(self, versions: Mapping[str, str]) -> None:
        """From now on a file of another version than here is not read: StorageError says that it was written again."""

    def size(self, path: str) -> int:
        """Bytes of a file. Raises MissingFile, StorageError."""

    def is_in_memory(self, path: str, byte_offset: int) -> bool:
        """Whether a byte can be had without asking a disk or a network; never asks them itself. Raises StorageError."""

    def close(self) -> None:
        """Give back files and connections."""


def open_storage(
    location: str | Path,
    storage_options: Mapping[str, Any] | None = None,
    *,
    retry: RetryPolicy | None = None,
) -> RangeReader:
    """The storage of a checkpoint: a directory, as a path or a ``file://`` URL, an object store, or any URL of fsspec.

    Args:
        storage_options: credentials, an endpoint, how local files are read: see docs/storage.md.
        retry: how often a request that fails in passing is tried again.

    Raises:
        CheckpointNotFound: no such directory, or a kind of URL that isn't known or whose package isn't installed.
        SpecError: an option that this kind of storage doesn't have.
    """
    from shardferry.storage.retrying import RetryingReader

    return RetryingReader(_storage_at(str(location), storage_options or {}), retry)


def _storage_at(location: str, storage_options: Mapping[str, Any]) -> RangeReader:
    from shardferry.storage import local, native, remote

    scheme, separator, _ = location.partition("://")
    if not separator:
        return local.LocalReader(Path(location), local.LocalOptions.of(storage_options))
    if scheme == "file":
        directory = Path(unquote(urlsplit(location).path))
        return local.LocalReader(directory, local.LocalOptions.of(storage_options))
    options = dict(storage_options)
    client = options.pop("client", None)
    if native.is_taken(location, client):
        return native.open_url(location, options)
    return remote.open_url(location, options)


def read_file(storage: RangeReader, path: str) -> bytes:
    """A whole (small) file."""
    data = bytearray(storage.size(path))
    storage.read_into(path, 0, memoryview(data))
    return bytes(data)


def fetch_window(
    storage: RangeReader,
    path: str,
    runs: Runs,
    *,
    run_all: Callable[[Callable[[tuple[int, int]], None], Iterable[tuple[int, int]]], Iterable[None]] = map,
) -> Window:
    """The window of a storage whose bytes have to be fetched: some requests, run by ``run_all``."""
    ranges = runs.ranges(max_gap_bytes=storage.traits.max_gap_bytes)
    # Pages between the ranges are never touched, and so cost no memory.
    memory = np.empty(runs.stop - runs.start, dtype=np.uint8).data

    def fetch(place: tuple[int, int]) -> None:
        start, stop = place
        storage.read_into(path, start, memory[start - runs.start : stop - runs.start])

    for _ in run_all(fetch, ranges) if len(ranges) > 1 else map(fetch, ranges):
        pass
    return Window(memory, num_requests=len(ranges), bytes_requested=sum(stop - start for start, stop in ranges))


def copy_bytes(target: memoryview, source: memoryview) -> None:
    """As ``target[:] = source``, but other threads may run meanwhile."""
    np.copyto(np.frombuffer(target, dtype=np.uint8), np.frombuffer(source, dtype=np.uint8))


def missing_file(where: str) -> MissingFile:
    return MissingFile(
        f"{where}: the file is missing, but the metadata says that it holds saved data; restore it or use another checkpoint"
    )


def written_again(where: str, *, now: str, before: str) -> StorageError:
    return StorageError(
        f"{where}: its version is {now}, it was {before} when the catalog was read: it was written again since. "
        "Open the checkpoint again."
    )
