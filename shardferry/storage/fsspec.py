"""Read byte ranges through any fsspec filesystem: an object store, a web server, the memory of another process.

Ranges are requested from the filesystem itself, not from its open files. Open files read ahead into a block cache, which
requests six times the bytes where a load reads items here and there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any, TypeVar

from shardferry.errors import CheckpointNotFound, SpecError, StorageError
from shardferry.storage.base import OBJECT_STORE, RangeReader, cut_answer, missing_file, spread, written_again
from shardferry.storage.retry import error_text, storage_error

T = TypeVar("T")

# The field that changes when a file is written again, by the names of s3fs, adlfs, gcsfs and the local filesystem. No other
# times: a listing and the information about one file have these in different forms.
_VERSION_FIELDS = ("ETag", "etag", "generation", "mtime")
# When a file was written, by the names of the local filesystem, s3fs, adlfs, gcsfs and the memory's.
_TIME_FIELDS = ("mtime", "LastModified", "last_modified", "updated", "created")


class FsspecRangeReader(RangeReader):
    """Files of a directory of an fsspec filesystem.

    The version of a file is compared when the file is first read, where the backend tells versions. The filesystem keeps its
    connections when the reader is closed, as others may use it too.

    Args:
        filesystem: an ``fsspec.AbstractFileSystem``.
        root: the directory's path in the filesystem, with or without the protocol.
    """

    def __init__(self, filesystem: Any, root: str) -> None:
        self._filesystem = filesystem
        self._root = str(filesystem._strip_protocol(root)).rstrip("/")
        self._sizes: dict[str, int] = {}
        # fsspec returns the bytes of a request as one object.
        traits = dataclasses.replace(OBJECT_STORE, holds_bodies=True)
        super().__init__(str(filesystem.unstrip_protocol(self._root)), traits)

    def listing(self) -> dict[str, int | None]:
        try:
            self._filesystem.invalidate_cache(self._root)  # it may be older than the end of the save
            entries = self._filesystem.ls(self._root, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointNotFound(f"{self.location}: no such directory, or nothing in it") from None
        except Exception as error:  # each backend has its own
            raise storage_error(f"{self.location}: can't be listed", error) from error
        files = {entry["name"].rsplit("/", 1)[-1]: entry for entry in entries if entry["type"] == "file"}
        self._versions = {name: version for name, entry in files.items() if (version := _version(entry)) is not None}
        self._times = {name: time for name, entry in files.items() if (time := _time_s(entry)) is not None}
        return {name: files[name].get("size") for name in sorted(files)}

    def size(self, path: str) -> int:
        if path not in self._sizes:
            found = self._call(lambda: self._filesystem.info(self._path(path)), path, "its size can't be found").get(
                "size"
            )
            if found is None:
                raise StorageError(f"{self.location}/{path}: the storage doesn't tell its size")
            self._sizes[path] = int(found)
        return self._sizes[path]

    def read_into(self, path: str, byte_offset: int, *buffers: memoryview) -> None:
        nbytes = sum(map(len, buffers))
        if not nbytes:
            return
        stop = byte_offset + nbytes
        what = f"reading bytes {byte_offset} to {stop} failed"
        data = self._call(lambda: self._checked_range(path, byte_offset, stop), path, what)
        if len(data) != nbytes:
            raise cut_answer(f"{self.location}/{path}", byte_offset, stop, num_bytes=len(data))
        spread(memoryview(data), buffers)

    def _checked_range(self, path: str, start: int, stop: int) -> bytes:
        self._check_version(path)
        if not self._reads_through_files():
            return bytes(self._filesystem.cat_file(self._path(path), start, stop))
        with self._filesystem.open(self._path(path), "rb", cache_type="none") as file:
            file.seek(start)
            return bytes(file.read(stop - start))

    def _check_version(self, path: str) -> None:
        expected = self._expected.get(path)
        if expected is None:
            return
        self._filesystem.invalidate_cache(self._root)  # otherwise it may answer from an older listing
        found = _version(self._filesystem.info(self._path(path)))
        if found is not None and found != expected:
            raise written_again(f"{self.location}/{path}", now=found, before=expected)
        self._expected.pop(path, None)

    def _reads_through_files(self) -> bool:
        """Whether the backend has no ranges of its own, so that fsspec reads them through a file with a block cache."""
        from fsspec import AbstractFileSystem

        # The object is asked, not its class: asynchronous backends get their methods when the object is made.
        return getattr(self._filesystem.cat_file, "__func__", None) is AbstractFileSystem.cat_file

    def _call(self, request: Callable[[], T], path: str, what: str) -> T:
        where = f"{self.location}/{path}"
        try:
            return request()
        except StorageError:
            raise
        except FileNotFoundError as error:
            raise missing_file(where) from error
        except Exception as error:  # each backend has its own
            raise storage_error(f"{where}: {what}", error) from error

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}"


def open_location(location: str, storage_options: Mapping[str, Any]) -> FsspecRangeReader:
    """The storage of a URL, with the options of its backend.

    Raises:
        CheckpointNotFound: the kind of URL is unknown, its package is missing, or the backend refuses the options.
        SpecError: an option of S3 is another client's.
    """
    options = {name: value for name, value in storage_options.items() if name != "client"}
    scheme = location.partition("://")[0]
    if scheme in ("s3", "s3a"):
        _check_s3_options(options)
    try:
        from fsspec.core import url_to_fs

        filesystem, root = url_to_fs(location, **options)
    except ImportError as error:
        raise CheckpointNotFound(f"{location}: {scheme}:// needs a package that is not installed: {error}") from error
    except Exception as error:  # each backend has its own
        raise CheckpointNotFound(f"{location}: {scheme}:// can't be opened: {error_text(error)}") from error
    return FsspecRangeReader(filesystem, root)


# Options of obstore and pyarrow, which s3fs would ignore, and s3fs's name of each.
_S3FS_NAMES = {
    "access_key": "key",
    "access_key_id": "key",
    "anonymous": "anon",
    "endpoint": "endpoint_url",
    "endpoint_override": "endpoint_url",
    "region": "client_kwargs: {region_name: ...}",
    "secret_access_key": "secret",
    "secret_key": "secret",
    "session_token": "token",
    "skip_signature": "anon",
}


def _check_s3_options(options: Mapping[str, Any]) -> None:
    for name in options:
        if name in _S3FS_NAMES:
            raise SpecError(
                f"storage_options: s3fs has no option {name!r}, its name there is {_S3FS_NAMES[name]}; with obstore "
                f"(pip install 'shardferry[object-stores]') {name} works too"
            )


def _version(entry: Mapping[str, Any]) -> str | None:
    return next((f"{name} {entry[name]}" for name in _VERSION_FIELDS if entry.get(name)), None)


def _time_s(entry: Mapping[str, Any]) -> float | None:
    """When a file was written, in seconds since the epoch; None where its entry doesn't tell."""
    time = next((entry[name] for name in _TIME_FIELDS if entry.get(name)), None)
    with suppress(ValueError):
        time = datetime.fromisoformat(time) if isinstance(time, str) else time
    if isinstance(time, datetime):
        return time.timestamp()
    return float(time) if isinstance(time, int | float) else None
