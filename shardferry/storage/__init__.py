"""Where a checkpoint's bytes are, and how to get ranges of them."""

from shardferry.storage.base import RangeReader, open_storage
from shardferry.storage.local import LocalReader
from shardferry.storage.remote import RemoteReader

__all__ = ["LocalReader", "RangeReader", "RemoteReader", "open_storage"]
