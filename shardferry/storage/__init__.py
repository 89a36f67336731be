"""Where a checkpoint's bytes are, and how to get ranges of them."""

from shardferry.storage.base import RangeReader, open_storage
from shardferry.storage.fsspec import RemoteReader
from shardferry.storage.local import LocalReader
from shardferry.storage.retry import RetryingReader, RetryPolicy
from shardferry.storage.traits import StorageTraits

__all__ = [
    "LocalReader",
    "RangeReader",
    "RemoteReader",
    "RetryPolicy",
    "RetryingReader",
    "StorageTraits",
    "open_storage",
]
