"""Read the metadata files of a checkpoint into memory, in pieces side by side, and digest them on the way."""

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
    digest: bytes  # changes with any byte of any file

    @classmethod
    def read(cls, storage: RangeReader, names: Sequence[str]) -> MetadataFiles:
        """Read them. Raises StorageError where a file is missing or short."""
        contents = [np.empty(storage.size(name), dtype=np.uint8).data for name in names]
        pieces = list(_pieces(contents))
        whole = hashlib.sha256()

        def fetch(piece: tuple[int, int]) -> bytes:
            file, start = piece
            target = contents[file][start : start + _PIECE_BYTES]
            storage.read_into(names[file], start, target)
            return hashlib.sha256(target).digest()

        with ThreadPoolExecutor(_PIECES_AT_ONCE, thread_name_prefix="shardferry-metadata") as pool:
            for (file, start), digest in zip(pieces, pool.map(fetch, pieces), strict=True):
                whole.update(f"{names[file]!a} {start} {len(contents[file])} ".encode() + digest)
        return cls(names, contents, whole.digest())

    def parsed(self, location: str) -> Iterator[tuple[str, Metadata]]:
        """Name, for error messages, and content of each file. Raises UnsafeMetadata, CatalogError."""
        for name, content in zip(self.names, self.contents, strict=True):
            source = f"{location}/{name}"
            yield source, parse_metadata(content, source=source)

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.contents))


def _pieces(contents: Sequence[memoryview]) -> Iterator[tuple[int, int]]:
    """File and first byte of each piece; an empty file is one."""
    for file, content in enumerate(contents):
        for start in range(0, max(1, len(content)), _PIECE_BYTES):
            yield file, start
