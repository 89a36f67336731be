"""Read byte ranges of local files: positioned reads, memory maps, and direct I/O where it is asked for."""

from __future__ import annotations

import errno
import logging
import mmap
import os
import stat
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from shardferry.errors import CheckpointNotFound, SpecError, StorageError
from shardferry.storage.base import (
    KIB,
    MIB,
    RangeReader,
    StorageTraits,
    missing_file,
    spread,
    without_first,
    written_again,
)
from shardferry.storage.retry import storage_error

logger = logging.getLogger(__name__)

LOCAL_FILES = StorageTraits(
    max_gap_bytes=16 * KIB, max_over_read=0.25, max_request_bytes=8 * MIB, is_local=True, maps_files=True
)

ALIGNMENT = 4096  # bytes: positions, lengths and addresses of direct reads are multiples of it; all disks accept that
BOUNCE_BYTES = 4 * MIB  # length of a direct read, at most
_NO_DIRECT_IO = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY, errno.ESPIPE, errno.EISDIR})
_OPEN = (
    os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
)  # opening a FIFO would wait for somebody who writes to it
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFDIR: "a directory",
}


class PageCache(StrEnum):
    """What the kernel is told about the pages that are read."""

    KEEP = "keep"  # nothing
    READ_AHEAD = "read_ahead"  # before each request: all of it is needed
    DROP = "drop"  # after each request: its pages are not needed again


@dataclass(frozen=True, slots=True)
class LocalOptions:
    """How local files are read."""

    direct_io: bool = False  # bypass the page cache, where the file system can
    page_cache: PageCache = PageCache.KEEP

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> LocalOptions:
        """Convert ``storage_options``. Raises SpecError for an unknown option or value."""
        if unknown := sorted(set(options) - {"direct_io", "page_cache"}):
            raise SpecError(
                f"storage_options: local files have no option {unknown[0]!r}; they have direct_io and page_cache"
            )
        direct_io, page_cache = options.get("direct_io", False), options.get("page_cache", PageCache.KEEP)
        if not isinstance(direct_io, bool):
            raise SpecError(f"storage_options: direct_io is {direct_io!r}; it is true or false")
        try:
            return cls(direct_io, PageCache(page_cache))
        except ValueError:
            raise SpecError(
                f"storage_options: page_cache is {page_cache!r}; it is one of {', '.join(PageCache)}"
            ) from None


def open_location(location: str, storage_options: Mapping[str, Any]) -> LocalReader | None:
    """The storage of a path or a ``file://`` URL; None for another URL. Raises CheckpointNotFound, SpecError."""
    scheme, separator, _ = location.partition("://")
    if separator and scheme != "file":
        return None
    directory = Path(unquote(urlsplit(location).path)) if separator else Path(location)
    return LocalReader(directory, LocalOptions.parse(storage_options))


@dataclass(frozen=True, slots=True)
class _File:
    descriptor: int
    is_direct: bool


class LocalReader(RangeReader):
    """Files of a directory. Each file is opened once and stays open until ``close``.

    Where there is no such directory, no file is there, and ``listing`` raises CheckpointNotFound: a node that has nothing of a
    checkpoint on the nodes' own disks.
    """

    def __init__(self, directory: Path, options: LocalOptions | None = None) -> None:
        self._directory = directory
        self._options = options or LocalOptions()
        # A mapping goes through the page cache, and fills it.
        super().__init__(str(directory), replace(LOCAL_FILES, maps_files=self._options == LocalOptions()))
        self._files: dict[str, _File] = {}
        self._retired: list[int] = []  # stale descriptors, which another thread may still be reading from
        self._bounce = _BounceBuffer()
        self._lock = threading.Lock()

    def listing(self) -> dict[str, int | None]:
        if not self._directory.is_dir():
            what = "is a file, not a directory" if self._directory.exists() else "no such directory"
            raise CheckpointNotFound(
                f"{self._directory}: {what}; give the directory that holds the checkpoint's .metadata"
            )
        files = {}
        with os.scandir(self._directory) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # a link that leads nowhere
                    if not stat.S_ISDIR((status := entry.stat()).st_mode):  # a FIFO too: to open it is an error
                        files[entry.name] = status
        self._versions = {name: _version(status) for name, status in files.items()}
        self._times = {name: status.st_mtime for name, status in files.items()}
        return {name: files[name].st_size for name in sorted(files)}

    def lacking(self, paths: Iterable[str]) -> list[str]:
        with suppress(OSError):
            names = {path.name for path in self._directory.iterdir()}  # one request, and not one a file
            return [path for path in paths if path not in names and not (self._directory / path).exists()]
        return list(paths)

    def size(self, path: str) -> int:
        return os.fstat(self._file(path).descriptor).st_size

    def read_into(self, path: str, byte_offset: int, *buffers: memoryview) -> None:
        (file, _), nbytes = self._checked_file(path), sum(map(len, buffers))
        advice = self._options.page_cache
        if advice is PageCache.READ_AHEAD and not file.is_direct:
            os.posix_fadvise(file.descriptor, byte_offset, nbytes, os.POSIX_FADV_WILLNEED)
        done = 0
        while done < nbytes:
            left, position = without_first(buffers, done), byte_offset + done
            try:
                if file.is_direct:
                    count = pread_direct(file.descriptor, left, position, bounce=self._bounce.memory)
                else:
                    count = os.preadv(file.descriptor, left, position)
            except OSError as error:
                if error.errno == errno.ESTALE:  # of a network file system: the next attempt needs a new descriptor
                    with self._lock:
                        if self._files.get(path) is file:  # no other thread has opened it again
                            self._retired.append(self._files.pop(path).descriptor)
                raise storage_error(f"{self.location}/{path}: reading at byte {position} failed", error) from error
            if count == 0:
                raise StorageError(
                    f"{self.location}/{path}: ends at byte {self.size(path)}, "
                    f"but bytes {byte_offset} to {byte_offset + nbytes} are needed; the file is cut"
                )
            done += count
        if advice is PageCache.DROP:
            os.posix_fadvise(file.descriptor, byte_offset, nbytes, os.POSIX_FADV_DONTNEED)

    def mapped(self, path: str, start: int, stop: int) -> memoryview:
        if not self.traits.maps_files:
            return super().mapped(path, start, stop)
        # Accessing a page after the file's end would kill the process (SIGBUS): compare the size first.
        file, status = self._checked_file(path)
        if stop > status.st_size:
            raise StorageError(
                f"{self.location}/{path}: has {status.st_size} bytes, but bytes {start} to {stop} are needed"
            )
        first_page = start - start % mmap.ALLOCATIONGRANULARITY
        # The last view closes the mapping: closing it here would fail while an array still refers to it.
        pages = mmap.mmap(file.descriptor, stop - first_page, mmap.MAP_SHARED, mmap.PROT_READ, offset=first_page)
        return memoryview(pages)[start - first_page :]

    def close(self) -> None:
        with self._lock:
            for descriptor in [*self._retired, *(file.descriptor for file in self._files.values())]:
                os.close(descriptor)
            self._files.clear()
            self._retired.clear()

    def _checked_file(self, path: str) -> tuple[_File, os.stat_result]:
        """A file to read from, and its status. Raises StorageError if it is not the one that the catalog was made from."""
        file = self._file(path)
        status = os.fstat(file.descriptor)
        expected = self._expected.get(path)
        if expected is not None and (found := _version(status)) != expected:
            raise written_again(f"{self.location}/{path}", now=found, before=expected)
        return file, status

    def _file(self, path: str) -> _File:
        with self._lock:
            if path not in self._files:
                self._files[path] = self._open(path)
            return self._files[path]

    def _open(self, path: str) -> _File:
        where = self._directory / path
        try:
            descriptor = open_direct(where) if self._options.direct_io else None
            file = _File(os.open(where, _OPEN), False) if descriptor is None else _File(descriptor, is_direct=True)
        except FileNotFoundError:
            raise missing_file(f"{self.location}/{path}") from None
        except OSError as error:
            if error.errno == errno.ENXIO:
                raise _no_file(f"{self.location}/{path}", "a socket, or a device without a driver") from error
            raise storage_error(f"{self.location}/{path}: can't be opened", error) from error
        mode = os.fstat(file.descriptor).st_mode  # of what was opened, not of what has the name by now
        if not stat.S_ISREG(mode):
            os.close(file.descriptor)
            raise _no_file(f"{self.location}/{path}", _KINDS.get(stat.S_IFMT(mode), "of an unknown kind"))
        return file


def _no_file(where: str, what: str) -> StorageError:
    return StorageError(
        f"{where}: is {what}, not a regular file, and was not read; restore the file or use another checkpoint"
    )


def _version(status: os.stat_result) -> str:
    return f"{status.st_size} bytes, changed at {status.st_mtime_ns} ns"


class _BounceBuffer(threading.local):
    """Memory for direct reads, one buffer per thread."""

    def __init__(self) -> None:
        self.memory = memoryview(mmap.mmap(-1, BOUNCE_BYTES))  # whole pages, so it is aligned


def open_direct(path: Path) -> int | None:
    """A descriptor for direct I/O; None where the file system refuses it. Raises OSError if the file can't be opened."""
    descriptor = None
    try:
        descriptor = os.open(path, _OPEN | os.O_DIRECT)
        os.preadv(descriptor, [memoryview(mmap.mmap(-1, ALIGNMENT))], 0)  # some file systems refuse only this
    except OSError as error:
        if descriptor is not None:
            os.close(descriptor)
        if error.errno not in _NO_DIRECT_IO:
            raise
        logger.info("%s: no direct I/O on this file system (%s); reading through the page cache", path, error.strerror)
        return None
    return descriptor


def pread_direct(descriptor: int, buffers: Sequence[memoryview], byte_offset: int, *, bounce: memoryview) -> int:
    """Fill the buffers, one after the other, as far as one direct read goes.

    Args:
        descriptor: see `open_direct`.
        bounce: aligned memory of `BOUNCE_BYTES`, into which the disk's blocks are read.

    Returns:
        The number of bytes read: 0 at the end of the file.
    """
    start = byte_offset - byte_offset % ALIGNMENT
    skipped = byte_offset - start
    wanted = sum(map(len, buffers))
    length = min(BOUNCE_BYTES, -(-(skipped + wanted) // ALIGNMENT) * ALIGNMENT)
    found = os.preadv(descriptor, [bounce[:length]], start)
    count = min(found - skipped, wanted)
    if count <= 0:
        return 0
    spread(bounce[skipped : skipped + count], buffers)
    return count
