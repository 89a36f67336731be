"""Read a whole checkpoint once and check what can be checked: cover, lengths, headers, checksums."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from shardferry.catalog import NO_FILE, Catalog
from shardferry.decode import HEAD_BYTES, MAX_HEAD_BYTES, HeadTooShort, parse_head
from shardferry.errors import DecodeError, StorageError
from shardferry.plan import find_problems
from shardferry.storage.base import RangeReader

_COPY_BYTES = 1024 * 1024  # of an item at a time, for its checksum


@dataclass(frozen=True, slots=True)
class _Item:
    key: str
    path: str
    byte_offset: int
    byte_length: int
    is_tensor: bool


class _ItemFile(io.RawIOBase):
    """An item inside a file, as a file of its own: what `zipfile` reads from."""

    def __init__(self, storage: RangeReader, item: _Item) -> None:
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
    items = list(_items(catalog))

    def check(item: _Item) -> str | None:
        try:
            _check(item, storage)
        except (StorageError, zipfile.BadZipFile, EOFError, ValueError) as error:
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


def _items(catalog: Catalog) -> Iterator[_Item]:
    for tensor in catalog.tensors.values():
        for chunk in tensor.chunks:
            if catalog.chunk_file[chunk] == NO_FILE:
                continue
            path = catalog.files[catalog.chunk_file[chunk]]
            start, length = int(catalog.chunk_byte_offset[chunk]), int(catalog.chunk_byte_length[chunk])
            yield _Item(tensor.key, path, start, length, is_tensor=chunk not in catalog.transformed)
    for saved in catalog.objects.values():
        yield _Item(saved.key, catalog.files[saved.file], saved.byte_offset, saved.byte_length, is_tensor=False)


def _check(item: _Item, storage: RangeReader) -> None:
    size = storage.size(item.path)
    if item.byte_offset + item.byte_length > size:
        raise StorageError(f"it ends at byte {item.byte_offset + item.byte_length}, the file has {size} bytes")
    if item.is_tensor:
        _check_head(item, storage)
    with zipfile.ZipFile(io.BufferedReader(_ItemFile(storage, item), _COPY_BYTES)) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise DecodeError(f"the checksum of its record {damaged} is wrong")


def _check_head(item: _Item, storage: RangeReader) -> None:
    length = HEAD_BYTES
    while True:
        head = bytearray(min(length, item.byte_length))
        storage.read_into(item.path, item.byte_offset, memoryview(head))
        try:
            parse_head(bytes(head))
        except HeadTooShort:
            if length >= MAX_HEAD_BYTES or len(head) < length:
                raise DecodeError(f"its header does not end within {len(head)} bytes") from None
            length *= 4
        else:
            return
