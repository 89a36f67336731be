"""Read a whole checkpoint once and check what can be checked: cover, lengths, headers, checksums."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

from shardferry.checkpoint.catalog import Catalog, KnownValue, RawItem
from shardferry.errors import DecodeError, StorageError
from shardferry.plan.cover import find_problems
from shardferry.read.items import ItemLayouts, StoredItem, TensorItem, decoded, items_of, read_item, read_layout
from shardferry.read.zip_header import ItemLayout, QuantisedState
from shardferry.storage.base import RangeReader

_COPY_BYTES = 1024 * 1024  # of an item at a time, for its checksum


class _ItemFile(io.RawIOBase):
    """An item inside a file, as a file of its own: what `zipfile` reads from."""

    def __init__(self, storage: RangeReader, item: StoredItem) -> None:
        self._storage = storage
        self._item = item
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._item.byte_length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer)
        count = min(len(target), max(0, self._item.byte_length - self._position))
        self._storage.read_into(self._item.path, self._item.byte_offset + self._position, target[:count])
        self._position += count
        return count


def verify_checkpoint(
    catalog: Catalog, storage: RangeReader, *, concurrency: int, on_item: Callable[[int], None] = lambda _: None
) -> list[str]:
    """Problems of a checkpoint, in words; none where it is whole.

    Args:
        concurrency: items read side by side.
        on_item: called with each item's bytes when it has been read.
    """
    problems = find_problems(catalog)
    items = _items(catalog)

    def check(item: StoredItem) -> str | None:
        try:
            _check(item, storage)
        except DecodeError as error:
            return str(error)
        except StorageError as error:
            return f"{item.key}: item at byte {item.byte_offset} of {item.path}: {error}"
        finally:
            on_item(item.byte_length)
        return None

    with ThreadPoolExecutor(max_workers=concurrency, thread_name_prefix="shardferry-verify") as pool:
        problems += [problem for problem in pool.map(check, items) if problem]
    return problems


def verified_bytes(catalog: Catalog) -> int:
    """Bytes of all items."""
    return sum(item.byte_length for item in _items(catalog))


def _items(catalog: Catalog) -> list[StoredItem]:
    return [item for key in (*catalog.tensors, *catalog.objects) for item in items_of(catalog, key)]


def _check(item: StoredItem, storage: RangeReader) -> None:
    """Raises StorageError, DecodeError; QuantisedState where an item can't be loaded though it is whole."""
    if isinstance(item.format, KnownValue):
        return
    size = storage.size(item.path)
    if item.byte_stop > size:
        raise StorageError(f"it ends at byte {item.byte_stop}, the file has {size} bytes")
    if not item.is_ranged:
        content = bytes(decoded(item, read_item(item, storage, item.byte_length)))
        refused = _refused(item, lambda tensor: ItemLayouts().layout(tensor, content))
        _check_sums(item, io.BytesIO(content))
    else:
        refused = _refused(item, lambda tensor: read_layout(tensor, storage, ItemLayouts()))
        file = io.BufferedReader(_ItemFile(storage, item), _COPY_BYTES)
        if isinstance(item.format, RawItem):  # no checksum to hold it against; that it can be read is what can be said
            while file.read(_COPY_BYTES):
                pass
        else:
            _check_sums(item, file)
    if refused is not None:
        raise refused


def _refused(item: StoredItem, parse: Callable[[TensorItem], ItemLayout]) -> QuantisedState | None:
    """Why an item can't be loaded though it may be whole. Raises DecodeError where it is damaged."""
    try:
        if isinstance(item, TensorItem):
            parse(item)
    except QuantisedState as error:
        return error
    return None


def _check_sums(item: StoredItem, file: IO[bytes]) -> None:
    """Of all records of a zip. Where it was saved without (`torch.serialization.set_crc32_options`), it is only read."""
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            if not any(record.CRC for record in records):
                for record in records:
                    record.CRC = None  # type: ignore[assignment]  # what zipfile itself takes for "don't check"
            damaged = archive.testzip()
    except StorageError:
        raise
    except Exception as error:  # zipfile raises many kinds for damaged bytes
        raise item.damaged(f"it is not a whole zip ({type(error).__name__}: {error})") from error
    if damaged is not None:
        raise item.damaged(f"the checksum of its record {damaged} is wrong")
