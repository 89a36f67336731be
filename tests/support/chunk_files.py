"""Checkpoints chunk by chunk: real items by torch.save, at places and with strides that the test chooses."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import zstandard
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from shardferry.region import Region


@dataclass(frozen=True)
class Chunk:
    """One chunk of a tensor, in the file of a number."""

    region: Region
    tensor: torch.Tensor  # saved as it is: with its strides, its storage and its storage offset
    file: int = 0
    compressed: bool = False


def write_chunks(path: Path, saved: Mapping[str, tuple[Sequence[int], Sequence[Chunk]]]) -> None:
    """A checkpoint of tensors, each with its shape and its chunks."""
    path.mkdir()
    files: dict[str, bytearray] = {}
    tensors, storage = {}, {}
    for key, (shape, chunks) in saved.items():
        boxes = [ChunkStorageMetadata(torch.Size(c.region.offsets), torch.Size(c.region.sizes)) for c in chunks]
        properties = TensorProperties(dtype=chunks[0].tensor.dtype)
        tensors[key] = TensorStorageMetadata(properties, torch.Size(shape), boxes)
        for chunk in chunks:
            name, item = f"__{chunk.file}_0.distcp", _item(chunk)
            file = files.setdefault(name, bytearray())
            descriptors = ["stream.zstd/1"] if chunk.compressed else None
            storage[MetadataIndex(key, torch.Size(chunk.region.offsets))] = _StorageInfo(
                name, len(file), len(item), descriptors
            )
            file += item
    for name, data in files.items():
        (path / name).write_bytes(data)
    (path / ".metadata").write_bytes(pickle.dumps(Metadata(tensors, None, storage)))


def _item(chunk: Chunk) -> bytes:
    stream = io.BytesIO()
    torch.save(chunk.tensor, stream)
    return zstandard.compress(stream.getvalue()) if chunk.compressed else stream.getvalue()
