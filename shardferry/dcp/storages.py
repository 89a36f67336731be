"""Turn a torch StorageReader into a storage that is read in ranges, where its files are known to be DCP's own."""

from __future__ import annotations

import os

from torch.distributed.checkpoint import FileSystemReader, StorageReader

from shardferry.storage.base import RangeReader, open_storage


def has_ranges(reader: StorageReader) -> bool:
    """Whether `storage_of` can take a reader: torch's own, as it is. A subclass may do anything when it reads."""
    return type(reader) is FileSystemReader


def storage_of(reader: StorageReader) -> RangeReader:
    """The storage that a reader reads from. Raises CheckpointNotFound."""
    assert isinstance(reader, FileSystemReader)
    return open_storage(os.fspath(reader.path))
