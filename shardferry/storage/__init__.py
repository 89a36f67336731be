"""Where a checkpoint's bytes are: a protocol for byte ranges of files, one file per kind of storage, and retries.

::

    open.py ──► local.py | obstore.py | fsspec.py ──► retry.py ──► base.py
"""

from shardferry.storage.base import RangeReader, StorageTraits
from shardferry.storage.fsspec import FsspecRangeReader
from shardferry.storage.local import LocalReader
from shardferry.storage.obstore import ObstoreReader
from shardferry.storage.open import open_storage
from shardferry.storage.retry import RetryingReader, RetryPolicy

__all__ = [
    "FsspecRangeReader",
    "LocalReader",
    "ObstoreReader",
    "RangeReader",
    "RetryPolicy",
    "RetryingReader",
    "StorageTraits",
    "open_storage",
]
