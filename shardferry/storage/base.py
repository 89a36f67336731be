"""What the reader asks of a storage, and which storage a location names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import unquote, urlsplit

import numpy as np

from shardferry.errors import MissingFile, StorageError
from shardferry.storage.runs import Runs
from shardferry.storage.traits import StorageTraits

if TYPE_CHECKING:
    from shardferry.storage.retry import RetryPolicy


class ByteReader(Protocol):
    """Reads byte ranges of files. Safe to use from several threads."""

    def read_into(self, path: str, byte_offset: int, *buffers: memoryview) -> None:
        """Fill the buffers, one after the other, from ``byte_offset`` on, with one request.

        Raises:
            StorageError: the file has fewer bytes.
        """


class ByteSource(ByteReader, Protocol):
    """Reads byte ranges, and has a place for those that are looked at on their way."""

    def window(self, path: str, runs: Runs) -> AbstractContextManager[memoryview]:
        """The bytes from the first run's start to the last one's stop; of some storages only those of the runs, and what is
        near them, are ever fetched. It may be looked at inside the ``with`` alone.

        Raises:
            StorageError: the file has fewer bytes.
        """


class RangeReader(ByteReader, Protocol):
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

    def mapped(self, path: str, start: int, stop: int) -> memoryview:
        """Bytes of a file in place: nothing is fetched before it is looked at. Only where ``traits.maps_files`` says so.

        Raises:
            StorageError: the file has fewer bytes, or can't be mapped.
        """

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
    from shardferry.storage.retry import RetryingReader

    return RetryingReader(_storage_at(str(location), storage_options or {}), retry)


def _storage_at(location: str, storage_options: Mapping[str, Any]) -> RangeReader:
    from shardferry.storage import fsspec as remote
    from shardferry.storage import local
    from shardferry.storage import obstore as native

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


def spread(data: memoryview, buffers: Sequence[memoryview]) -> None:
    """Copy what one request brought to the buffers, one after the other, as far as it goes."""
    done = 0
    for buffer in buffers:
        count = min(len(buffer), len(data) - done)
        copy_bytes(buffer[:count], data[done : done + count])
        done += count


def not_mapped(location: str) -> StorageError:
    return StorageError(f"{location}: its files can't be mapped into memory; their bytes have to be read")


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
