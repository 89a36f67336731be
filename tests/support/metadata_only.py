"""Checkpoints of which only the metadata is there: what somebody has who copied one file out of a large checkpoint."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from shardferry.checkpoint.catalog import Catalog


def write_metadata(catalog: Catalog, directory: Path) -> Path:
    """Write the ``.metadata`` that a catalog would be read from. Returns the directory."""
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for key, saved in catalog.tensors.items():
        regions = [catalog.region(saved, chunk) for chunk in saved.chunks]
        chunks = [ChunkStorageMetadata(torch.Size(r.offsets), torch.Size(r.sizes)) for r in regions]
        entries[key] = TensorStorageMetadata(TensorProperties(dtype=saved.dtype), torch.Size(saved.shape), chunks)
        for chunk, region in zip(saved.chunks, regions, strict=True):
            where = (int(column[chunk]) for column in (catalog.chunk_byte_offset, catalog.chunk_byte_length))
            storage[MetadataIndex(key, torch.Size(region.offsets))] = _StorageInfo(
                catalog.files[catalog.chunk_file[chunk]], *where
            )
    for key, item in catalog.objects.items():
        entries[key] = BytesStorageMetadata()
        storage[MetadataIndex(key)] = _StorageInfo(catalog.files[item.file], item.byte_offset, item.byte_length)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / ".metadata").write_bytes(pickle.dumps(Metadata(entries, dict(catalog.paths or {}), storage)))
    return directory
