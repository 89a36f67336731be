"""The interface of a storage: the byte ranges of one checkpoint's files, and how storages of one kind are best read."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from shardferry.config import ReadLimits, ReadOptions, SplitLimits
from shardferry.errors import MissingFile, StorageError

KIB, MIB = 1024, 1024 * 1024
_LOCAL_ITEM_BYTES = 64 * KIB  # larger items of local files are better read in place than copied out of a buffer
_LOCAL_PART_BYTES = 1 * MIB  # fits a core's cache, so that a part is copied to its ranks out of the cache


@dataclass(frozen=True, slots=True)
class StorageTraits:
    """How one kind of storage is best read. `ReadOptions` may override the limits."""

    max_gap_bytes: int  # between two byte ranges of one request; a longer gap costs more than another request
    max_over_read: float  # unwanted bytes of a request, divided by the wanted ones
    max_request_bytes: int  # longer ranges are split into several requests
    is_local: bool
    maps_files: bool = False  # `RangeReader.mapped` works: bytes are fetched when they are accessed
    holds_bodies: bool = False  # the bytes of a request are in memory twice until it is done
    has_listing: bool = True  # `RangeReader.listing` works
    tells_sizes: bool = False  # each answer has the file's size; otherwise `size` costs a request, or opens the file

    def read_limits(self, options: ReadOptions) -> ReadLimits:
        """The limits of one load: those of the options, else the storage's own."""
        request = self.max_request_bytes if options.max_request is None else options.max_request
        return ReadLimits(
            max_gap_bytes=self.max_gap_bytes if options.max_gap is None else options.max_gap,
            max_over_read=self.max_over_read,
            max_request_bytes=request,
            max_item_bytes=min(request, _LOCAL_ITEM_BYTES) if self.is_local else request,
            maps_files=self.maps_files,
        )

    def split_limits(self, limits: ReadLimits) -> SplitLimits:
        """How chunks are split among ranks that read for each other."""
        if self.is_local:
            return SplitLimits(max_part_bytes=_LOCAL_PART_BYTES)
        # A part that begins in a window ends within two.
        return SplitLimits(max_part_bytes=limits.max_request_bytes, window_bytes=limits.max_request_bytes // 2)


OBJECT_STORE = StorageTraits(max_gap_bytes=64 * KIB, max_over_read=8.0, max_request_bytes=8 * MIB, is_local=False)


class ByteReader(Protocol):
    """Reads byte ranges of files. Safe to use from several threads."""

    @abstractmethod
    def read_into(self, path: str, byte_offset: int, *buffers: memoryview) -> None:
        """Fill the buffers, one after the other, with the bytes from ``byte_offset`` on, in one request.

        Raises:
            StorageError: the file has fewer bytes, or the request failed.
        """


class RangeReader(ByteReader):
    """The files of one checkpoint, and the expected version of each.

    Args:
        location: as `open_storage` takes it.
        traits: how this kind of storage is best read.
        options: the ``storage_options`` with which `open_storage` opens the same storage again, in any process.
    """

    def __init__(self, location: str, traits: StorageTraits, options: Mapping[str, Any] | None = None) -> None:
        self.location = location
        self.traits = traits
        self.options = dict(options or {})
        self._versions: dict[str, str] = {}  # of the last listing
        self._times: dict[str, float] = {}  # of the last listing
        self._expected: dict[str, str] = {}

    @abstractmethod
    def listing(self) -> dict[str, int | None]:
        """Size in bytes of each file directly in the checkpoint, by name, sorted. None: the storage does not tell it.

        Raises:
            CheckpointNotFound: there is no such directory.
            StorageError: the storage can't list (see ``traits.has_listing``), or the request failed.
        """

    def versions(self) -> dict[str, str]:
        """Version of each file of the last `listing`, by name, where the storage tells one: an etag, a time of change."""
        return dict(self._versions)

    def times(self) -> dict[str, float]:
        """When each file of the last `listing` was written, by name, in seconds since the epoch, where the storage tells it."""
        return dict(self._times)

    def expect(self, versions: Mapping[str, str]) -> None:
        """From now on, reading a file of another version than the one given here raises StorageError."""
        self._expected = dict(versions)

    def where(self, path: str) -> str:
        """A file's full name, for messages."""
        return f"{self.location}/{path}"

    @abstractmethod
    def size(self, path: str) -> int:
        """Size of a file in bytes.

        Raises:
            MissingFile: there is no such file.
            StorageError: the request failed.
        """

    def lacking(self, paths: Iterable[str]) -> list[str]:
        """Which of some files are not there as this node sees it. None where every node sees the same: a service's files."""
        return []

    def mapped(self, path: str, start: int, stop: int) -> memoryview:
        """The bytes ``[start, stop)`` of a file, mapped: each page is fetched when it is accessed.

        Raises:
            StorageError: the file has fewer bytes, or can't be mapped (see ``traits.maps_files``).
        """
        raise StorageError(f"{self.location}: its files can't be mapped into memory; their bytes have to be read")

    def close(self) -> None:
        """Release files and connections."""


def read_file(storage: RangeReader, path: str) -> bytes:
    """All bytes of a small file.

    Raises:
        MissingFile: there is no such file.
        StorageError: a request failed.
    """
    data = bytearray(storage.size(path))
    storage.read_into(path, 0, memoryview(data))
    return bytes(data)


def spread(data: memoryview, buffers: Sequence[memoryview]) -> None:
    """Copy ``data`` into the buffers, one after the other, until one of the two ends."""
    done = 0
    for buffer in buffers:
        count = min(len(buffer), len(data) - done)
        copy_bytes(buffer[:count], data[done : done + count])
        done += count


def without_first(buffers: Sequence[memoryview], num_bytes: int) -> Sequence[memoryview]:
    """The buffers without their first ``num_bytes`` bytes, which are filled already."""
    for index, buffer in enumerate(buffers):
        if num_bytes < len(buffer):
            return [buffer[num_bytes:], *buffers[index + 1 :]]
        num_bytes -= len(buffer)
    return []


def copy_bytes(target: memoryview, source: memoryview) -> None:
    """Do ``target[:] = source`` without holding the GIL."""
    np.copyto(np.frombuffer(target, dtype=np.uint8), np.frombuffer(source, dtype=np.uint8))


def cut_answer(where: str, start: int, stop: int, *, num_bytes: int) -> StorageError:
    """The error for a request that brought another number of bytes than it asked for."""
    return StorageError(
        f"{where}: bytes {start} to {stop} were asked for, {num_bytes} bytes came; "
        "the file is cut, or the storage doesn't serve ranges"
    )


def missing_file(where: str) -> MissingFile:
    """The error for a file that does not exist."""
    return MissingFile(
        f"{where}: the file is missing, but the metadata says that it holds saved data; restore it or use another checkpoint"
    )


def written_again(where: str, *, now: str, before: str) -> StorageError:
    """The error for a file whose version is not the expected one."""
    return StorageError(
        f"{where}: its version is {now}, it was {before} when the catalog was read: it was written again since. "
        "Open the checkpoint again."
    )
