"""Read byte ranges through any fsspec filesystem: an object store, a web server, another process's memory.

Ranges are asked of the filesystem itself, not of its open files: these read ahead into a block cache, which asks for six
times the bytes where a checkpoint's items are looked at here and there.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from shardferry.errors import CheckpointNotFound, StorageError
from shardferry.storage.base import Window
from shardferry.storage.runs import Runs

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

MAX_GAP_BYTES = 64 * 1024  # between two runs: fewer bytes than this cost less than another request


class RemoteReader:
    """Files of a directory of a filesystem.

    Args:
        filesystem: of fsspec. It is shared with whoever else uses it, and not closed here.
        root: the directory's path in it, with or without the protocol.
    """

    def __init__(self, filesystem: AbstractFileSystem, root: str) -> None:
        self._filesystem = filesystem
        self._root = str(filesystem._strip_protocol(root)).rstrip("/")
        self.location = filesystem.unstrip_protocol(self._root)
        self._sizes: dict[str, int] = {}
        self._lock = threading.Lock()

    def listing(self) -> dict[str, int | None]:
        try:
            self._filesystem.invalidate_cache(self._root)  # a listing of before the save was completed
            entries = self._filesystem.ls(self._root, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointNotFound(f"{self.location}: no such directory, or nothing in it") from None
        except Exception as error:  # each backend has its own
            raise StorageError(f"{self.location}: can't be listed: {_reason(error)}") from error
        files = {entry["name"].rsplit("/", 1)[-1]: entry.get("size") for entry in entries if entry["type"] == "file"}
        return dict(sorted(files.items()))

    def size(self, path: str) -> int:
        with self._lock:
            known = self._sizes.get(path)
        if known is not None:
            return known
        try:
            found = self._filesystem.info(self._path(path)).get("size")
        except Exception as error:
            raise self._failed(path, "its size can't be found", error) from error
        if found is None:
            raise StorageError(f"{self.location}/{path}: the storage doesn't tell its size")
        with self._lock:
            return self._sizes.setdefault(path, int(found))

    def read_into(self, path: str, byte_offset: int, buffer: memoryview) -> None:
        if not len(buffer):
            return
        stop = byte_offset + len(buffer)
        try:
            data = self._range(path, byte_offset, stop)
        except Exception as error:
            raise self._failed(path, f"reading bytes {byte_offset} to {stop} failed", error) from error
        self._check_length(path, byte_offset, stop, data)
        buffer[:] = data

    def window(self, path: str, runs: Runs) -> Window:
        ranges = runs.ranges(max_gap_bytes=MAX_GAP_BYTES)
        # Pages between the ranges are never touched, and so cost no memory.
        memory = np.empty(runs.stop - runs.start, dtype=np.uint8).data
        for (start, stop), data in zip(ranges, self._ranges(path, ranges), strict=True):
            memory[start - runs.start : stop - runs.start] = data
        return Window(memory, num_requests=len(ranges), bytes_requested=sum(stop - start for start, stop in ranges))

    def close(self) -> None:
        """The filesystem keeps its connections: it is not ours alone."""

    def _ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        starts, stops = map(list, zip(*ranges, strict=True))
        try:
            if self._reads_through_files():
                found = [self._range(path, start, stop) for start, stop in ranges]
            else:  # side by side, where the backend can
                found = self._filesystem.cat_ranges([self._path(path)] * len(ranges), starts, stops, on_error="raise")
        except Exception as error:
            raise self._failed(path, f"reading bytes {starts[0]} to {stops[-1]} failed", error) from error
        for (start, stop), data in zip(ranges, found, strict=True):
            self._check_length(path, start, stop, data)
        return found

    def _range(self, path: str, start: int, stop: int) -> bytes:
        if not self._reads_through_files():
            return bytes(self._filesystem.cat_file(self._path(path), start, stop))
        with self._filesystem.open(self._path(path), "rb", cache_type="none") as file:
            file.seek(start)
            return bytes(file.read(stop - start))

    def _reads_through_files(self) -> bool:
        """Whether the backend has no ranges of its own, so that fsspec reads them through a file with a cache."""
        from fsspec import AbstractFileSystem

        # Asked of the object, not of its class: asynchronous backends get their methods when they are made.
        return getattr(self._filesystem.cat_file, "__func__", None) is AbstractFileSystem.cat_file

    def _check_length(self, path: str, start: int, stop: int, data: bytes) -> None:
        if len(data) != stop - start:
            raise StorageError(
                f"{self.location}/{path}: bytes {start} to {stop} were asked for, {len(data)} bytes came; "
                "the file is cut, or the storage doesn't serve ranges"
            )

    def _failed(self, path: str, what: str, error: Exception) -> StorageError:
        if isinstance(error, FileNotFoundError):
            return StorageError(
                f"{self.location}/{path}: the file is missing, but the metadata says that it holds saved data; "
                "restore it or use another checkpoint"
            )
        return StorageError(f"{self.location}/{path}: {what}: {_reason(error)}")

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}"


def open_url(url: str, storage_options: Mapping[str, Any]) -> RemoteReader:
    """The storage that a URL names. Raises CheckpointNotFound where its kind is unknown, or its package is missing."""
    scheme = url.partition("://")[0]
    try:
        from fsspec.core import url_to_fs

        filesystem, root = url_to_fs(url, **storage_options)
    except ImportError as error:
        raise CheckpointNotFound(f"{url}: {scheme}:// needs a package that is not installed: {error}") from error
    except Exception as error:  # each backend has its own
        raise CheckpointNotFound(f"{url}: {scheme}:// can't be opened: {_reason(error)}") from error
    return RemoteReader(filesystem, root)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
