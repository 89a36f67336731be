"""Turn a location into its storage: the kinds of storage, tried in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shardferry.storage import fsspec, local, obstore
from shardferry.storage.base import RangeReader
from shardferry.storage.retry import RetryingReader, RetryPolicy

# Each makes the storage of a location, or returns None where another kind reads it; fsspec takes every location.
_KINDS: Sequence[Callable[[str, Mapping[str, Any]], RangeReader | None]]
_KINDS = (local.open_location, obstore.open_location, fsspec.open_location)


def open_storage(
    location: str | Path,
    storage_options: Mapping[str, Any] | None = None,
    *,
    retry: RetryPolicy | None = None,
) -> RangeReader:
    """Open the storage of a checkpoint.

    Args:
        location: a directory, as a path or a ``file://`` URL, the URL of an object store or a web server, or any URL of fsspec.
        storage_options: credentials, an endpoint, how local files are read: see docs/storage.md.
        retry: how often a request is tried where it fails with a transient error; default: `RetryPolicy`'s own numbers.

    Raises:
        CheckpointNotFound: there is no such directory, the kind of URL is unknown, or its package is not installed.
        SpecError: this kind of storage does not have one of the options.
    """
    options = dict(storage_options or {})
    opened = (open_location(str(location), options) for open_location in _KINDS)
    return RetryingReader(next(storage for storage in opened if storage is not None), retry)
