"""Turn a torch StorageReader into a storage that is read in ranges, where its files are known to be DCP's own.

The only place that looks into torch's readers; tests/core/test_private_apis.py fails when torch changes them.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from torch.distributed.checkpoint import FileSystemReader, StorageReader
from torch.distributed.checkpoint._extension import ExtensionRegistry

from shardferry.storage.base import RangeReader
from shardferry.storage.open import open_storage

_FSSPEC = "torch.distributed.checkpoint._fsspec_filesystem"  # importing it needs fsspec


def has_ranges(reader: StorageReader) -> bool:
    """Whether `storage_of` can take a reader: torch's own, as it is.

    A subclass may do anything when it reads, and a registry of somebody's own undoes what only its owner knows.
    """
    if type(reader) is not FileSystemReader and not _is_fsspec(reader):
        return False
    assert isinstance(reader, FileSystemReader)
    registry = reader.transforms.extension_registry
    return type(registry) is ExtensionRegistry and registry.extensions == ExtensionRegistry().extensions


def storage_of(reader: StorageReader) -> RangeReader:
    """The storage that a reader reads from. Raises CheckpointNotFound."""
    assert isinstance(reader, FileSystemReader)
    if _is_fsspec(reader):
        from shardferry.storage.fsspec import FsspecRangeReader
        from shardferry.storage.retry import RetryingReader

        filesystem: Any = reader.fs  # torch's wrapper around fsspec's own, which was made with the caller's options
        return RetryingReader(FsspecRangeReader(filesystem.fs, os.fspath(reader.path)))
    return open_storage(os.fspath(reader.path))


def _is_fsspec(reader: StorageReader) -> bool:
    module: Any = sys.modules.get(_FSSPEC)  # who made such a reader has imported it
    return module is not None and type(reader) is module.FsspecRangeReader
