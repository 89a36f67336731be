"""Keep the catalogs of checkpoints on disk, by the digest of their metadata, so that these are unpickled once.

A cache is never why something fails: what can't be read, is damaged or is of another version counts as not there, and what
can't be written is not kept. It trusts its own user alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shardferry.catalog import Catalog
from shardferry.catalog_file import FORMAT_VERSION, decode_catalog, encode_catalog
from shardferry.collector import paused_gc

CacheChoice = bool | str | os.PathLike[str]  # whether; or in which directory

_SUFFIX, _UNFINISHED = ".catalog", ".unfinished"
_ABANDONED_S = 3600.0  # no write takes that long: what is left of one that was killed
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CatalogCache:
    """A directory of catalogs."""

    directory: Path
    min_metadata_bytes: int = 4 * 1024 * 1024  # what is smaller opens in a tenth of a second as it is
    max_bytes: int = 1024**3  # of all catalogs together; those that were not used for longest go first

    @classmethod
    def of(cls, choice: CacheChoice) -> CatalogCache | None:
        """What a caller chose: a directory, the user's own (True), or none."""
        if isinstance(choice, bool):
            return cls(found) if choice and (found := _users_directory()) else None
        return cls(Path(choice).expanduser())

    def get(self, digest: bytes, *, location: str) -> Catalog | None:
        """The catalog of metadata of this digest; None where there is none that can be used."""
        name = _name(digest)
        try:
            with _opened(self.directory) as directory:
                data = _read(name, directory)
            with paused_gc():
                return decode_catalog(data, location=location)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:  # an UnusableFile, or a path that no system takes
            _log.info("%s/%s: not used, %s", self.directory, name, error)
            return None

    def put(self, digest: bytes, catalog: Catalog) -> None:
        """Keep the catalog of metadata of this digest, as far as that can be done."""
        pieces = encode_catalog(catalog)
        if sum(map(len, pieces)) > self.max_bytes:
            return
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _opened(self.directory) as directory:
                _write(_name(digest), pieces, directory)
                _make_room(directory, self.max_bytes, kept=_name(digest))
        except (OSError, ValueError) as error:
            _log.info("%s: the catalog of %s is not kept there: %s", self.directory, catalog.location, error)


def _name(digest: bytes) -> str:
    return f"{digest.hex()}-{FORMAT_VERSION}{_SUFFIX}"


def _users_directory() -> Path | None:
    """As the XDG base directory specification has it; None for a user without a home."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (given if given.is_absolute() else Path.home() / ".cache") / "shardferry"
    except RuntimeError:
        return None


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
    catalogs: list[tuple[float, int, str]] = []
    with os.scandir(directory) as entries:
        for entry in entries:
            found = entry.stat(follow_symlinks=False)
            if entry.name.endswith(_UNFINISHED) and found.st_mtime < time.time() - _ABANDONED_S:
                _remove(entry.name, directory)
            elif entry.name.endswith(_SUFFIX):
                catalogs.append((found.st_mtime, found.st_size, entry.name))
    num_bytes = sum(size for _, size, _ in catalogs)
    for _, size, name in sorted(catalogs):
        if num_bytes <= max_bytes:
            return
        if name != kept:
            _remove(name, directory)
            num_bytes -= size


def _remove(name: str, directory: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory)
