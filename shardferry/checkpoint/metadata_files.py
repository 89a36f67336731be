"""Read the metadata files of a checkpoint into memory, in pieces side by side."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from shardferry.checkpoint.metadata import Metadata, parse_metadata
from shardferry.storage.base import RangeReader

_PIECE_BYTES = 16 * 1024 * 1024
_PIECES_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class MetadataFiles:
    """Files in memory, as they are stored."""

    names: Sequence[str]
    contents: list[memoryview]

    @classmethod
    def read(cls, storage: RangeReader, names: Sequence[str]) -> MetadataFiles:
        """Read them. Raises StorageError where a file is missing or short."""
        contents = [np.empty(storage.size(name), dtype=np.uint8).data for name in names]
        pieces = list(_pieces(contents))

        def fetch(piece: tuple[int, int]) -> None:
            file, start = piece
            storage.read_into(names[file], start, contents[file][start : start + _PIECE_BYTES])

        with ThreadPoolExecutor(_PIECES_AT_ONCE, thread_name_prefix="shardferry-metadata") as pool:
            list(pool.map(fetch, pieces))
        return cls(names, contents)

    def digest(self) -> bytes:
        """SHA-256 of all names and contents."""
        whole = hashlib.sha256()
        for name, content in zip(self.names, self.contents, strict=True):
            whole.update(f"{name!a} {len(content)} ".encode())
            whole.update(content)
        return whole.digest()

    def parsed(self, location: str) -> Iterator[tuple[str, Metadata]]:
        """Name, for error messages, and content of each file. Raises UnsafeMetadata, CatalogError."""
        for name, content in zip(self.names, self.contents, strict=True):
            source = f"{location}/{name}"
            yield source, parse_metadata(content, source=source)


def _pieces(contents: Sequence[memoryview]) -> Iterator[tuple[int, int]]:
    """File and first byte of each piece; an empty file is one."""
    for file, content in enumerate(contents):
        for start in range(0, max(1, len(content)), _PIECE_BYTES):
            yield file, start
