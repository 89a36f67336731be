"""The protocol of a storage: the byte ranges of one checkpoint's files, and how storages of one kind are best read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from shardferry.errors import MissingFile, StorageError

KIB, MIB = 1024, 1024 * 1024


@dataclass(frozen=True, slots=True)
class StorageTraits:
    """How one kind of storage is best read. `ReadOptions` may override the limits."""

    max_gap_bytes: int  # between two byte ranges of one request; a longer gap costs more than another request
    max_over_read: float  # unwanted bytes of a request, divided by the wanted ones
    max_request_bytes: int  # longer ranges are split into several requests
    is_local: bool
    free_gap_bytes: int = 4096  # shorter gaps do not count as over-read: no disk, page cache or network reads less
    maps_files: bool = False  # `RangeReader.mapped` works: bytes are fetched when they are accessed
    holds_bodies: bool = False  # the bytes of a request are in memory twice until it is done
    has_listing: bool = True  # `RangeReader.listing` works
    tells_sizes: bool = False  # each answer has the file's size; otherwise `size` costs a request, or opens the file


OBJECT_STORE = StorageTraits(max_gap_bytes=64 * KIB, max_over_read=8.0, max_request_bytes=8 * MIB, is_local=False)


@dataclass(frozen=True, slots=True)
class ByteRuns:
    """Runs of equal length in one file: ``counts[d]`` of them at a distance of ``byte_strides[d]`` in each dimension.

    A strided box of a tensor is stored like this::

        rows of 6 bytes, 4 wanted of 3 rows    |xxxx..|xxxx..|xxxx|    start 0, run_bytes 4, counts (3,), byte_strides (6,)
    """

    start: int  # bytes, of the first run
    run_bytes: int
    counts: tuple[int, ...]  # outermost first; none is 0
    byte_strides: tuple[int, ...]  # descending

    @property
    def stop(self) -> int:
        """Where the last run ends: bytes, exclusive."""
        return (
            self.start + self.run_bytes + sum((n - 1) * s for n, s in zip(self.counts, self.byte_strides, strict=True))
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all runs."""
        return self.run_bytes * math.prod(self.counts)

    def are_one_range(self, *, max_gap_bytes: int, max_over_read: float, free_gap_bytes: int) -> bool:
        """Whether all runs are coalesced into one byte range.

        Args:
            max_gap_bytes: between two runs of one range.
            max_over_read: unwanted bytes of the range, divided by those of its runs.
            free_gap_bytes: shorter gaps do not count as unwanted bytes.
        """
        length, wanted, unwanted = self.run_bytes, self.run_bytes, 0
        for count, stride in zip(reversed(self.counts), reversed(self.byte_strides), strict=True):
            gap = stride - length
            wanted *= count
            unwanted = unwanted * count + (count - 1) * over_read_bytes(gap, free_gap_bytes=free_gap_bytes)
            if count > 1 and (gap > max_gap_bytes or unwanted > max_over_read * wanted):
                return False
            length += (count - 1) * stride
        return True


def over_read_bytes(gap_bytes: int, *, free_gap_bytes: int) -> int:
    """How many bytes of a gap count as over-read: all of them, or none of a gap shorter than ``free_gap_bytes``."""
    return gap_bytes if gap_bytes >= free_gap_bytes else 0


class ByteReader(Protocol):
    """Reads byte ranges of files. Safe to use from several threads."""

    def read_into(self, path: str, byte_offset: int, *buffers: memoryview) -> None:
        """Fill the buffers, one after the other, with the bytes from ``byte_offset`` on, in one request.

        Raises:
            StorageError: the file has fewer bytes, or the request failed.
        """


class ByteSource(ByteReader, Protocol):
    """Reads byte ranges, and lends views of byte runs."""

    def window(self, path: str, runs: ByteRuns) -> AbstractContextManager[memoryview]:
        """The bytes from the start of the first run to the end of the last one. The view is valid inside the ``with``.

        Some storages fetch only the runs and the bytes near them.

        Raises:
            StorageError: the file has fewer bytes, or the request failed.
        """


class RangeReader(ByteReader, Protocol):
    """The files of one checkpoint."""

    location: str  # as `open_storage` takes it

    @property
    def traits(self) -> StorageTraits:
        """How this kind of storage is best read."""

    def listing(self) -> dict[str, int | None]:
        """Size in bytes of each file directly in the checkpoint, by name, sorted. None: the storage does not tell it.

        Raises:
            CheckpointNotFound: there is no such directory.
            StorageError: the storage can't list (see ``traits.has_listing``), or the request failed.
        """

    def versions(self) -> dict[str, str]:
        """Version of each file of the last `listing`, by name, where the storage tells one: an etag, a time of change.

        The version of a file changes when the file is written again.
        """

    def expect(self, versions: Mapping[str, str]) -> None:
        """From now on, reading a file of another version than the one given here raises StorageError."""

    def size(self, path: str) -> int:
        """Size of a file in bytes.

        Raises:
            MissingFile: there is no such file.
            StorageError: the request failed.
        """

    def mapped(self, path: str, start: int, stop: int) -> memoryview:
        """The bytes ``[start, stop)`` of a file, mapped: each page is fetched when it is accessed.

        Raises:
            StorageError: the file has fewer bytes, or can't be mapped (see ``traits.maps_files``).
        """

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


def copy_bytes(target: memoryview, source: memoryview) -> None:
    """Do ``target[:] = source`` without holding the GIL."""
    np.copyto(np.frombuffer(target, dtype=np.uint8), np.frombuffer(source, dtype=np.uint8))


def not_mapped(location: str) -> StorageError:
    """The error of a storage whose files can't be mapped."""
    return StorageError(f"{location}: its files can't be mapped into memory; their bytes have to be read")


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
