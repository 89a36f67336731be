"""Keep files on disk by the digest of what they were made of, in a directory that is its own user's alone.

A cache is never why something fails: what can't be read, is damaged or is of another version counts as not there, and what
can't be written is not kept.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shardferry._gc import paused_gc
from shardferry.checkpoint.column_file import Content, FileKind

CacheChoice = bool | str | os.PathLike[str]  # whether; or in which directory

MAX_BYTES = 1024**3  # of a directory's files, where nobody says another number

_UNFINISHED = ".unfinished"
_KEPT = re.compile(r"[0-9a-f]+-\d+\.[a-z]+")  # as `_name` has it
_ABANDONED_S = 3600.0  # no write takes that long: what is left of one that was killed
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH

_log = logging.getLogger(__name__)


def directory_of(choice: CacheChoice) -> Path | None:
    """The directory that a caller chose, the user's own (True), or none.

    The user's own is where the XDG base directory specification has it; a user without a home has none.
    """
    if not isinstance(choice, bool):
        return Path(choice).expanduser()
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (given if given.is_absolute() else Path.home() / ".cache") / "shardferry" if choice else None
    except RuntimeError:
        return None


@dataclass(frozen=True, slots=True)
class CacheDirectory:
    """Files of all kinds, each under the digest of what it was made of, and the version of its kind."""

    path: Path
    max_bytes: int = MAX_BYTES  # of all files together; those that were not used for longest go first

    def get(self, kind: FileKind, digest: bytes, decode: Callable[[memoryview], Content]) -> Content | None:
        """What ``decode`` makes of a file; None where there is none that can be used."""
        name = _name(kind, digest)
        try:
            with _opened(self.path) as directory:
                data = _read(name, directory)
            with paused_gc():
                return decode(data)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:  # an UnusableFile, or a path that no system takes
            _log.info("%s/%s: not used, %s", self.path, name, error)
            return None

    def put(self, kind: FileKind, digest: bytes, pieces: Sequence[bytes | memoryview]) -> None:
        """Keep a file of these bytes, as far as that can be done."""
        if sum(map(len, pieces)) > self.max_bytes:
            return
        name = _name(kind, digest)
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _opened(self.path) as directory:
                _write(name, pieces, directory)
                _make_room(directory, self.max_bytes, kept=name)
        except (OSError, ValueError) as error:
            _log.info("%s/%s: not kept, %s", self.path, name, error)


def _name(kind: FileKind, digest: bytes) -> str:
    return f"{digest.hex()}-{kind.version}.{kind.noun}"


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """The directory's descriptor: what was checked and what is used are the same, whatever is renamed meanwhile."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if {found.st_uid, path.lstat().st_uid} != {os.geteuid()}:
            raise PermissionError(f"the directory is another user's ({found.st_uid}, not {os.geteuid()})")
        if found.st_mode & _OTHERS_MAY_WRITE:
            raise PermissionError(f"others may write to the directory (mode {stat.S_IMODE(found.st_mode):o})")
        yield descriptor
    finally:
        os.close(descriptor)


def _read(name: str, directory: int) -> memoryview:
    """All of a file. It is not mapped: a home may lie on a network, where a mapped file that another host removes is a signal
    that kills the process.
    """
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            raise PermissionError("it is no file of this user")
        data = np.empty(found.st_size, dtype=np.uint8).data
        count = 0
        while count < len(data) and (more := file.readinto(data[count:])):
            count += more
        with contextlib.suppress(OSError):
            os.utime(descriptor)  # used now
        return data[:count]


def _write(name: str, pieces: Sequence[bytes | memoryview], directory: int) -> None:
    """Under a name of its own first: nobody ever sees a part of it, also not of two that are written at once."""
    unfinished = f"{name}.{os.getpid()}.{secrets.token_hex(4)}{_UNFINISHED}"
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.writelines(pieces)
        os.replace(unfinished, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(unfinished, dir_fd=directory)
        raise


def _make_room(directory: int, max_bytes: int, *, kept: str) -> None:
    """Remove what was not used for longest until the rest is small enough, and what killed writers left."""
    files: list[tuple[float, int, str]] = []
    with os.scandir(directory) as entries:
        for entry in entries:
            found = entry.stat(follow_symlinks=False)
            if entry.name.endswith(_UNFINISHED) and found.st_mtime < time.time() - _ABANDONED_S:
                _remove(entry.name, directory)
            elif _KEPT.fullmatch(entry.name):
                files.append((found.st_mtime, found.st_size, entry.name))
    num_bytes = sum(size for _, size, _ in files)
    for _, size, name in sorted(files):
        if num_bytes <= max_bytes:
            return
        if name != kept:
            _remove(name, directory)
            num_bytes -= size


def _remove(name: str, directory: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory)
