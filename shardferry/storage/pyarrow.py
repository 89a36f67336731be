"""Read byte ranges through a pyarrow filesystem that somebody else made, as Ray Train's checkpoints bring one.

pyarrow is imported only where a location has such a filesystem. A local one is a path, and one around fsspec is fsspec's:
their own kinds of storage read these better.
"""

from __future__ import annotations

import importlib
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from shardferry.errors import CheckpointNotFound, SpecError, StorageError
from shardferry.storage.base import OBJECT_STORE, RangeReader, cut_answer, missing_file, spread, written_again
from shardferry.storage.retry import TransientStorageError, is_transient_status, storage_error

T = TypeVar("T")


class PyarrowReader(RangeReader):
    """Files of a directory of a pyarrow filesystem.

    The version of a file (size and time of change) is compared when the file is first read. Each file is opened once and
    stays open until ``close``; reads of one file run at the same time.

    Args:
        filesystem: a ``pyarrow.fs.FileSystem``.
        location: the directory, as `resolve` writes it: ``s3://bucket/run/step-1000``.
    """

    def __init__(self, filesystem: Any, location: str) -> None:
        # It has S3's client shut down at exit. A filesystem that was unpickled imports less, and the process would crash then.
        importlib.import_module("pyarrow.fs")
        # The answer to a request for several buffers is one object.
        super().__init__(location, replace(OBJECT_STORE, holds_bodies=True))
        self._filesystem = filesystem
        self._directory = location.partition("://")[2].rstrip("/")
        self._files: dict[str, Any] = {}
        self._lock = threading.Lock()

    def listing(self) -> dict[str, int | None]:
        from pyarrow.fs import FileSelector, FileType

        try:
            found = self._filesystem.get_file_info(FileSelector(self._directory))
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointNotFound(f"{self.location}: no such directory, or nothing in it") from None
        except OSError as error:
            if "NO_SUCH_BUCKET" in str(error):
                raise CheckpointNotFound(f"{self.location}: no such bucket") from None
            raise _storage_error(f"{self.location}: can't be listed", error) from error
        files = {info.base_name: info for info in found if info.type != FileType.Directory}
        self._versions = {name: _version(info) for name, info in files.items()}
        self._times = {name: info.mtime_ns / 1e9 for name, info in files.items() if info.mtime_ns is not None}
        return {name: files[name].size for name in sorted(files)}

    def size(self, path: str) -> int:
        return int(self._call(lambda: self._file(path).size(), path, "its size can't be found"))

    def read_into(self, path: str, byte_offset: int, *buffers: memoryview) -> None:
        nbytes = sum(map(len, buffers))
        if nbytes:
            what = f"reading bytes {byte_offset} to {byte_offset + nbytes} failed"
            self._call(lambda: self._fill(path, byte_offset, nbytes, *buffers), path, what)

    def close(self) -> None:
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()

    def _fill(self, path: str, byte_offset: int, nbytes: int, *buffers: memoryview) -> None:
        self._check_version(path)
        file, stop = self._file(path), byte_offset + nbytes
        if stop > file.size():
            there = max(0, file.size() - byte_offset)
            raise cut_answer(f"{self.location}/{path}", byte_offset, stop, num_bytes=there)
        if len(buffers) == 1:  # straight into place
            done = file.get_stream(byte_offset, nbytes).readinto(buffers[0])
        else:
            data = memoryview(file.read_at(nbytes, byte_offset))
            spread(data, buffers)
            done = len(data)
        if done != nbytes:
            raise cut_answer(f"{self.location}/{path}", byte_offset, stop, num_bytes=done)

    def _check_version(self, path: str) -> None:
        if (expected := self._expected.get(path)) is not None:
            info = self._filesystem.get_file_info(self._path(path))
            if info.size is None:
                raise missing_file(f"{self.location}/{path}")
            if _version(info) != expected:
                raise written_again(f"{self.location}/{path}", now=_version(info), before=expected)
            self._expected.pop(path, None)

    def _file(self, path: str) -> Any:
        with self._lock:
            if path not in self._files:
                self._files[path] = self._filesystem.open_input_file(self._path(path))
            return self._files[path]

    def _call(self, request: Callable[[], T], path: str, what: str) -> T:
        where = f"{self.location}/{path}"
        try:
            return request()
        except StorageError:
            raise
        except FileNotFoundError as error:
            raise missing_file(where) from error
        except OSError as error:  # pyarrow's ArrowIOError is Python's own
            raise _storage_error(f"{where}: {what}", error) from error

    def _path(self, path: str) -> str:
        return f"{self._directory}/{path}"


def _version(info: Any) -> str:
    return f"{info.size} bytes, changed at {info.mtime_ns} ns"


# pyarrow raises OSError for all that a service answers, and says the rest in the text; tests/core/storage/test_pyarrow.py
# provokes the cases with a real server.
_STATUS = re.compile(r"HTTP status (\d{3})")
_TRANSIENT = re.compile(
    r"AWS Error (INTERNAL_FAILURE|NETWORK_CONNECTION|REQUEST_TIMEOUT|SERVICE_UNAVAILABLE|SLOW_DOWN|THROTTLING)\b"
    r"|\b(Status\(|StatusCode::)?(ABORTED|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|UNAVAILABLE)\b"  # of Google's client
)


def _storage_error(what: str, error: OSError) -> StorageError:
    status = _STATUS.search(str(error))
    if _TRANSIENT.search(str(error)) or (status and is_transient_status(int(status[1]))):
        return TransientStorageError(f"{what}: {error}")
    return storage_error(what, error)


def fsspec_of(filesystem: Any) -> Any:
    """The fsspec filesystem that a pyarrow filesystem hands all calls to; None where it is not such a one."""
    return filesystem.handler.fs if filesystem.type_name.startswith("py::fsspec+") else None


def resolve(path: str, filesystem: Any, storage_options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The location and the options that open a directory, in any process.

    Args:
        path: in the filesystem, with or without the kind of filesystem (``s3://``); without a filesystem, any location.
        filesystem: of pyarrow, or None.
        storage_options: those that were given.

    Returns:
        A path for a local filesystem. For another one, its kind and the path as a URL, and the filesystem among the options.

    Raises:
        SpecError: the filesystem is not one of pyarrow, or there are options that it would ignore.
    """
    options = {name: value for name, value in storage_options.items() if name != "filesystem"}
    if filesystem is None:
        return path, options
    if not hasattr(filesystem, "type_name"):
        raise SpecError(f"{path}: its filesystem is a {type(filesystem).__name__}, not one of pyarrow.fs")
    while filesystem.type_name == "subtree":
        path = f"{filesystem.base_path.rstrip('/')}/{path.lstrip('/')}"
        filesystem = filesystem.base_fs
    if (of_fsspec := fsspec_of(filesystem)) is not None:
        location = str(of_fsspec.unstrip_protocol(path))
    else:
        location = f"{filesystem.type_name}://{path.removeprefix(f'{filesystem.type_name}://')}"
    if location.startswith(("local://", "file://")):
        return location.partition("://")[2], options
    if options:
        raise SpecError(
            f"{location}: brings its own filesystem, which ignores the storage_options {', '.join(options)}; give them to "
            "the filesystem, or give the location as a URL"
        )
    return location, {"filesystem": filesystem}
