"""Read byte ranges of local files: positioned reads in place, memory-mapped windows for strided ones."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from shardferry.errors import CheckpointNotFound, SpecError, StorageError
from shardferry.storage.base import missing_file, not_mapped, written_again
from shardferry.storage.direct import open_direct, pread_direct
from shardferry.storage.traits import LOCAL_FILES, StorageTraits
from shardferry.storage.transient import TransientStorageError, is_transient


class PageCache(Enum):
    """What the kernel is told about the pages of what is read."""

    KEEP = "keep"  # nothing
    READ_AHEAD = "read_ahead"  # all of a request is wanted, before it is read
    DROP = "drop"  # what was read is not wanted again


@dataclass(frozen=True, slots=True)
class LocalOptions:
    """How local files are read."""

    direct_io: bool = False  # past the page cache, where the file system can
    page_cache: PageCache = PageCache.KEEP

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> LocalOptions:
        """From ``storage_options``. Raises SpecError."""
        unknown = sorted(set(options) - {"direct_io", "page_cache"})
        if unknown:
            raise SpecError(
                f"storage_options: local files have no option {unknown[0]!r}; they have direct_io and page_cache"
            )
        direct_io, page_cache = options.get("direct_io", False), options.get("page_cache", PageCache.KEEP)
        if not isinstance(direct_io, bool):
            raise SpecError(f"storage_options: direct_io is {direct_io!r}; it is true or false")
        try:
            return cls(direct_io, PageCache(page_cache))
        except ValueError:
            known = ", ".join(advice.value for advice in PageCache)
            raise SpecError(f"storage_options: page_cache is {page_cache!r}; it is one of {known}") from None


@dataclass(frozen=True, slots=True)
class _File:
    descriptor: int
    is_direct: bool


class LocalReader:
    """Files of a directory. Each file is opened once and stays open until ``close``."""

    def __init__(self, directory: Path, options: LocalOptions | None = None) -> None:
        if not directory.is_dir():
            what = "is a file, not a directory" if directory.exists() else "no such directory"
            raise CheckpointNotFound(f"{directory}: {what}; give the directory that holds the checkpoint's .metadata")
        self.location = str(directory)
        self._directory = directory
        self._options = options or LocalOptions()
        self._files: dict[str, _File] = {}
        self._retired: list[int] = []  # descriptors that were replaced, which another thread may still read from
        self._versions: dict[str, str] = {}
        self._expected: dict[str, str] = {}
        self._as_expected: set[int] = set()  # descriptors that were compared
        self._lock = threading.Lock()

    @property
    def traits(self) -> StorageTraits:
        # A mapping goes through the page cache, and fills it.
        return replace(LOCAL_FILES, maps_files=self._options == LocalOptions())

    def listing(self) -> dict[str, int | None]:
        with os.scandir(self._directory) as entries:
            files = {entry.name: entry.stat() for entry in entries if entry.is_file()}
        self._versions = {name: _version(status) for name, status in files.items()}
        return {name: files[name].st_size for name in sorted(files)}

    def versions(self) -> dict[str, str]:
        return dict(self._versions)

    def expect(self, versions: Mapping[str, str]) -> None:
        self._expected = dict(versions)
        self._as_expected.clear()

    def size(self, path: str) -> int:
        return os.fstat(self._file(path).descriptor).st_size

    def read_into(self, path: str, byte_offset: int, *buffers: memoryview) -> None:
        file, nbytes = self._checked(path), sum(map(len, buffers))
        advice = self._options.page_cache
        if advice is PageCache.READ_AHEAD and not file.is_direct:
            os.posix_fadvise(file.descriptor, byte_offset, nbytes, os.POSIX_FADV_WILLNEED)
        left: Sequence[memoryview] = buffers
        done = 0
        while done < nbytes:
            try:
                count = _pread(file, left, byte_offset + done)
            except OSError as error:
                raise self._failed(path, file, f"reading at byte {byte_offset + done} failed", error) from error
            if count == 0:
                raise StorageError(
                    f"{self.location}/{path}: ends at byte {self.size(path)}, "
                    f"but bytes {byte_offset} to {byte_offset + nbytes} are needed; the file is cut"
                )
            done += count
            if done < nbytes:
                left = _rest(buffers, done)
        if advice is PageCache.DROP:
            os.posix_fadvise(file.descriptor, byte_offset, nbytes, os.POSIX_FADV_DONTNEED)

    def mapped(self, path: str, start: int, stop: int) -> memoryview:
        if not self.traits.maps_files:
            raise not_mapped(self.location)
        # A page beyond the file's end would kill the process (SIGBUS): look at the size first.
        file, size = self._checked(path), self.size(path)
        if stop > size:
            raise StorageError(f"{self.location}/{path}: has {size} bytes, but bytes {start} to {stop} are needed")
        first_page = start - start % mmap.ALLOCATIONGRANULARITY
        # The mapping goes with its last view: closing it by hand would fail while an array still looks at it.
        pages = mmap.mmap(file.descriptor, stop - first_page, mmap.MAP_SHARED, mmap.PROT_READ, offset=first_page)
        # Only the pages that are looked at are read, once each.
        return memoryview(pages)[start - first_page :]

    def close(self) -> None:
        with self._lock:
            for descriptor in [*self._retired, *(file.descriptor for file in self._files.values())]:
                os.close(descriptor)
            self._files.clear()
            self._retired.clear()
            self._as_expected.clear()

    def _checked(self, path: str) -> _File:
        """A file to read from: the one that the catalog was made of."""
        file = self._file(path)
        if file.descriptor not in self._as_expected:
            found = _version(os.fstat(file.descriptor))
            if (expected := self._expected.get(path, found)) != found:
                raise written_again(f"{self.location}/{path}", now=found, before=expected)
            self._as_expected.add(file.descriptor)
        return file

    def _file(self, path: str) -> _File:
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = self._open(path)
            return file

    def _open(self, path: str) -> _File:
        where = self._directory / path
        try:
            if self._options.direct_io and (descriptor := open_direct(where)) is not None:
                return _File(descriptor, is_direct=True)
            return _File(os.open(where, os.O_RDONLY | os.O_CLOEXEC), is_direct=False)
        except FileNotFoundError:
            raise missing_file(f"{self.location}/{path}") from None
        except OSError as error:
            kind = TransientStorageError if is_transient(error) else StorageError
            raise kind(f"{self.location}/{path}: can't be opened: {error}") from error

    def _retire(self, path: str, file: _File) -> None:
        """Let the file be opened anew, unless another thread has done so."""
        with self._lock:
            if self._files.get(path) is file:
                self._retired.append(self._files.pop(path).descriptor)

    def _failed(self, path: str, file: _File, what: str, error: OSError) -> StorageError:
        if error.errno == errno.ESTALE:  # of a network file system: only a new descriptor helps
            self._retire(path, file)
        kind = TransientStorageError if is_transient(error) else StorageError
        return kind(f"{self.location}/{path}: {what}: {error}")


def _pread(file: _File, buffers: Sequence[memoryview], byte_offset: int) -> int:
    if file.is_direct:
        return pread_direct(file.descriptor, buffers, byte_offset)
    return os.preadv(file.descriptor, buffers, byte_offset)


def _rest(buffers: Sequence[memoryview], done: int) -> Sequence[memoryview]:
    """What is to be filled yet, where ``done`` bytes are."""
    place = 0
    while done >= len(buffers[place]):
        done -= len(buffers[place])
        place += 1
    return [buffers[place][done:], *buffers[place + 1 :]]


def _version(status: os.stat_result) -> str:
    return f"{status.st_size} bytes, changed at {status.st_mtime_ns} ns"
