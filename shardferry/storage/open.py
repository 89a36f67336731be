"""Turn a location into its storage: the kinds of storage, tried in order."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pkgutil import resolve_name
from typing import Any, Protocol

from shardferry.errors import SpecError
from shardferry.storage import fsspec, local, obstore, pyarrow
from shardferry.storage.base import RangeReader
from shardferry.storage.joined import OPTION, JoinedReader, WeightsFrom
from shardferry.storage.retry import RetryingReader, RetryPolicy

# Each makes the storage of a location, or returns None where another kind reads it; fsspec takes every location.
_KINDS: Sequence[Callable[[str, Mapping[str, Any]], RangeReader | None]]
_KINDS = (local.open_location, obstore.open_location, fsspec.open_location)
# By scheme: "module:function" of kinds that need more than the core, imported when a location has the scheme.
_BEYOND_THE_CORE = {"shardferry+memory://": "shardferry.actors.resident.memory_storage:open_location"}


class Placed(Protocol):
    """A directory of a pyarrow filesystem, as a ``ray.train.Checkpoint`` is one."""

    @property
    def path(self) -> str:
        """The directory, in the filesystem."""

    @property
    def filesystem(self) -> Any:
        """A ``pyarrow.fs.FileSystem``."""


Location = str | os.PathLike[str] | Placed


def open_storage(
    location: Location,
    storage_options: Mapping[str, Any] | None = None,
    *,
    retry: RetryPolicy | None = None,
) -> RangeReader:
    """Open the storage of a checkpoint.

    Args:
        location: a directory, as a path or a ``file://`` URL, the URL of an object store or a web server, any URL of fsspec, or
            a ``ray.train.Checkpoint``.
        storage_options: credentials, an endpoint, how local files are read: see docs/storage.md. ``filesystem`` is the
            ``pyarrow.fs.FileSystem`` that the location is a directory of. See `with_weights_from` for weights elsewhere.
        retry: how often a request is tried where it fails with a transient error; default: `RetryPolicy`'s own numbers.

    Raises:
        CheckpointNotFound: there is no such directory, the kind of URL is unknown, or its package is not installed.
        SpecError: this kind of storage does not have one of the options, or the location is of another class.
    """
    given = dict(storage_options or {})
    if isinstance(elsewhere := given.get(OPTION), WeightsFrom):
        del given[OPTION]
        with ExitStack() as stack:  # closes the first where the second can't be opened
            first = stack.enter_context(closing(open_storage(location, given, retry=retry)))
            joined = JoinedReader(first, open_storage(elsewhere.location, elsewhere.options, retry=retry))
            stack.pop_all()
        return joined
    path, options = _path_and_options(location, given)
    if (filesystem := options.get("filesystem")) is not None:
        storage = _of_filesystem(filesystem, path)
    elif (home := next((_BEYOND_THE_CORE[s] for s in _BEYOND_THE_CORE if path.startswith(s)), None)) is not None:
        storage = resolve_name(home)(path, options)
    else:
        opened = (open_location(path, options) for open_location in _KINDS)
        storage = next(found for found in opened if found is not None)
    return RetryingReader(storage, retry, options=storage.options or options)


def _of_filesystem(filesystem: Any, location: str) -> RangeReader:
    """The storage of a directory of a pyarrow filesystem."""
    of_fsspec = pyarrow.fsspec_of(filesystem)
    if of_fsspec is None:
        return pyarrow.PyarrowReader(filesystem, location)
    return fsspec.FsspecRangeReader(of_fsspec, location)


def _path_and_options(location: Location, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A location as text, and its options, with the filesystem among them where the location brings one."""
    filesystem = options.get("filesystem", getattr(location, "filesystem", None))
    path = getattr(location, "path", location) if hasattr(location, "filesystem") else location
    if not isinstance(path, str | os.PathLike):
        raise SpecError(
            f"location: a {type(location).__name__} is neither a path, nor a URL, nor a ray.train.Checkpoint"
        )
    return pyarrow.resolve(os.fspath(path), filesystem, options)
