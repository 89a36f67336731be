"""Turn a JSON header and columns of integers into the bytes of one file and back: nothing in it could be executed.

::

    |magic, version, lengths, digest of all else: 64 bytes|JSON|...|column|...|column|...

Each column begins at a multiple of 64 bytes and is used where it lies.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

_HEAD = struct.Struct("<8sQQQ")  # magic, version, bytes of the JSON, bytes of the file
_DIGEST_BYTES = 32
_JSON_START = _HEAD.size + _DIGEST_BYTES
_ALIGNMENT = 64
_WRONG_CONTENT = (AttributeError, LookupError, RecursionError, StopIteration, TypeError, ValueError)

Content = TypeVar("Content")


class UnusableFile(ValueError):
    """Bytes that are no whole file of the kind and version that is asked for; says why."""


@dataclass(frozen=True, slots=True)
class FileKind:
    """What files of one kind have in common."""

    noun: str  # what one is, in messages and as the suffix of its name
    magic: bytes  # eight
    version: int
    columns: Mapping[str, str]  # in this order; by name, the dtype


def encode_file(
    kind: FileKind, header: Mapping[str, Any], columns: Mapping[str, np.ndarray]
) -> list[bytes | memoryview]:
    """The bytes of a file, one piece after another. Columns that have their dtype are not copied."""
    lengths = [columns[name].size for name in kind.columns]
    words = json.dumps({**header, "columns": lengths}, separators=(",", ":")).encode()
    contents: list[bytes | memoryview] = [words]
    contents += [_bytes_of(columns[name], dtype) for name, dtype in kind.columns.items()]
    pieces = [piece for content in contents for piece in (content, bytes(-len(content) % _ALIGNMENT))]
    head = _HEAD.pack(kind.magic, kind.version, len(words), _JSON_START + sum(map(len, pieces)))
    return [head, _digest(head, *pieces), *pieces]


def _bytes_of(column: np.ndarray, dtype: str) -> memoryview:
    return memoryview(np.ascontiguousarray(column, dtype).reshape(-1).view(np.uint8))  # type: ignore[arg-type]  # arrays are buffers


def _digest(*pieces: bytes | memoryview) -> bytes:
    digest = hashlib.sha256()  # processors have instructions for it: twice as quick as BLAKE2
    for piece in pieces:
        digest.update(piece)
    return digest.digest()


def decode_file(
    kind: FileKind, data: memoryview, build: Callable[[Mapping[str, Any], Mapping[str, Any]], Content]
) -> Content:
    """What is built of the header and the columns of a file that has these bytes. Columns are flat, and views of the bytes.

    Raises:
        UnusableFile: the bytes are cut, were changed, are of another kind or version, or nothing can be built of them.
    """
    header_bytes = _checked_head(kind, data)
    try:
        header = json.loads(bytes(data[_JSON_START : _JSON_START + header_bytes]))
        return build(header, dict(_columns(kind, data, _aligned(_JSON_START + header_bytes), header["columns"])))
    except UnusableFile:
        raise
    except _WRONG_CONTENT as error:
        raise UnusableFile(f"it is no {kind.noun} ({type(error).__name__}: {error})") from error


def _checked_head(kind: FileKind, data: memoryview) -> int:
    """Bytes of the JSON."""
    if len(data) < _JSON_START:
        raise UnusableFile(f"it has {len(data)} bytes, which is less than a head")
    head, digest = data[: _HEAD.size], data[_HEAD.size : _JSON_START]
    magic, version, header_bytes, num_bytes = _HEAD.unpack(head)
    if magic != kind.magic:
        raise UnusableFile(f"it is no {kind.noun}")
    if version != kind.version:
        raise UnusableFile(f"it is of version {version}, not {kind.version}")
    if num_bytes != len(data):
        raise UnusableFile(f"it has {len(data)} of its {num_bytes} bytes")
    if _digest(head, data[_JSON_START:]) != digest:
        raise UnusableFile("its bytes were changed")
    return int(header_bytes)


def _columns(kind: FileKind, data: memoryview, start: int, lengths: Sequence[int]) -> Iterator[tuple[str, np.ndarray]]:
    for (name, dtype), length in zip(kind.columns.items(), lengths, strict=True):
        yield name, np.frombuffer(data, dtype, length, start)
        start = _aligned(start + length * np.dtype(dtype).itemsize)


def _aligned(num_bytes: int) -> int:
    return num_bytes + -num_bytes % _ALIGNMENT
