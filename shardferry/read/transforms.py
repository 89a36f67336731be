"""Undo what a writer did to an item's whole stream: compressed bytes into what ``torch.save`` wrote.

The writer notes each transformation in the metadata: torch/distributed/checkpoint/_extension.py. Torch has one of its own,
``stream.zstd/1``, with whichever of the packages zstandard and pyzstd is installed; any other is its user's, and unknown here.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from shardferry.errors import DecodeError

ZSTANDARD = "stream.zstd"
_PACKAGES = ("zstandard", "pyzstd")


def undo_transforms(data: bytes | bytearray, descriptors: Sequence[str]) -> bytes:
    """An item as it was before it was transformed.

    Raises:
        DecodeError: a transformation that isn't known, a package that isn't installed, or damaged bytes.
    """
    for descriptor in descriptors:
        name, _, version = descriptor.partition("/")
        if name != ZSTANDARD or version.partition(".")[0] != "1":
            raise DecodeError(
                f"it was transformed by {descriptor!r}, which only its writer can undo ({ZSTANDARD}/1 is known "
                "here); save without this extension"
            )
        data = _decompressed(data)
    return bytes(data)


def _decompressed(data: bytes | bytearray) -> bytes:
    decompressor = _decompressor()
    try:
        content = bytes(decompressor.decompress(data))
    except Exception as error:  # each package has its own
        raise DecodeError(
            f"its {len(data)} compressed bytes can't be decompressed ({error}); the file is damaged"
        ) from error
    if not decompressor.eof or decompressor.unused_data:
        raise DecodeError(f"its {len(data)} compressed bytes are not one whole frame; the file is damaged")
    return content


def _decompressor() -> Any:
    """Of one frame, which is all that a writer makes of an item: has ``decompress`` and ``eof``."""
    for package in _PACKAGES:
        try:
            module = import_module(package)
        except ImportError:
            continue
        decompressor = module.ZstdDecompressor()
        return decompressor.decompressobj() if package == "zstandard" else decompressor
    raise DecodeError(
        f"it is compressed with Zstandard, and neither {' nor '.join(_PACKAGES)} is installed: install one"
    )
