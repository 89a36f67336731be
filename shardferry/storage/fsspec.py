"""Read byte ranges through any fsspec filesystem: an object store, a web server, another process's memory.

Ranges are asked of the filesystem itself, not of its open files: these read ahead into a block cache, which asks for six
times the bytes where a checkpoint's items are looked at here and there.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from shardferry.errors import CheckpointNotFound, StorageError
from shardferry.storage.base import missing_file, not_mapped, spread, written_again
from shardferry.storage.traits import OBJECT_STORE, StorageTraits
from shardferry.storage.transient import TransientStorageError, is_transient

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

# What backends call what changes when a file is written again: s3fs, adlfs, gcsfs, the local one. No other times: a listing
# and the file's own information give these in different forms.
_VERSIONS = ("ETag", "etag", "generation", "mtime")


class RemoteReader:
    """Files of a directory of a filesystem.

    A file's version is checked where the backend lists one, when the file is first read.

    Args:
        filesystem: of fsspec. It is shared with whoever else uses it, and not closed here.
        root: the directory's path in it, with or without the protocol.
    """

    # fsspec gives a request's bytes as one object.
    traits: StorageTraits = dataclasses.replace(OBJECT_STORE, holds_bodies=True)

    def __init__(self, filesystem: AbstractFileSystem, root: str) -> None:
        self._filesystem = filesystem
        self._root = str(filesystem._strip_protocol(root)).rstrip("/")
        self.location = filesystem.unstrip_protocol(self._root)
        self._sizes: dict[str, int] = {}
        self._versions: dict[str, str] = {}
        self._expected: dict[str, str] = {}  # of files that were not read from yet
        self._lock = threading.Lock()

    def listing(self) -> dict[str, int | None]:
        try:
            self._filesystem.invalidate_cache(self._root)  # a listing of before the save was completed
            entries = self._filesystem.ls(self._root, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointNotFound(f"{self.location}: no such directory, or nothing in it") from None
        except Exception as error:  # each backend has its own
            raise _error(f"{self.location}: can't be listed", error) from error
        files = {entry["name"].rsplit("/", 1)[-1]: entry for entry in entries if entry["type"] == "file"}
        self._versions = {name: version for name, entry in files.items() if (version := _version(entry)) is not None}
        return {name: files[name].get("size") for name in sorted(files)}

    def versions(self) -> dict[str, str]:
        return dict(self._versions)

    def expect(self, versions: Mapping[str, str]) -> None:
        self._expected = dict(versions)

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

    def read_into(self, path: str, byte_offset: int, *buffers: memoryview) -> None:
        nbytes = sum(map(len, buffers))
        if not nbytes:
            return
        stop = byte_offset + nbytes
        what = f"reading bytes {byte_offset} to {stop} failed"
        try:
            self._check_version(path)
            data = self._range(path, byte_offset, stop)
        except StorageError:
            raise
        except Exception as error:
            raise self._failed(path, what, error) from error
        if len(data) != nbytes:
            raise StorageError(
                f"{self.location}/{path}: bytes {byte_offset} to {stop} were asked for, {len(data)} bytes came; "
                "the file is cut, or the storage doesn't serve ranges"
            )
        spread(memoryview(data), buffers)

    def mapped(self, path: str, start: int, stop: int) -> memoryview:
        raise not_mapped(self.location)

    def close(self) -> None:
        """The filesystem keeps its connections: it is not ours alone."""

    def _check_version(self, path: str) -> None:
        expected = self._expected.get(path)
        if expected is None:
            return
        self._filesystem.invalidate_cache(self._root)  # else it may tell what it listed before
        found = _version(self._filesystem.info(self._path(path)))
        if found is not None and found != expected:
            raise written_again(f"{self.location}/{path}", now=found, before=expected)
        self._expected.pop(path, None)

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

    def _failed(self, path: str, what: str, error: Exception) -> StorageError:
        where = f"{self.location}/{path}"
        return missing_file(where) if isinstance(error, FileNotFoundError) else _error(f"{where}: {what}", error)

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


def _version(entry: Mapping[str, Any]) -> str | None:
    return next((f"{name} {entry[name]}" for name in _VERSIONS if entry.get(name)), None)


def _error(what: str, error: Exception) -> StorageError:
    return (TransientStorageError if is_transient(error) else StorageError)(f"{what}: {_reason(error)}")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
