"""Catalogs without files: made from torch's own metadata classes, through our own parser."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from shardferry.catalog import Catalog
from shardferry.catalog_builder import build_catalog
from shardferry.metadata import parse_metadata
from shardferry.region import Region

Saved = Mapping[str, tuple[Sequence[int], Sequence[Region]]]  # FQN -> shape and chunks


def catalog_of(saved: Saved, *, name: str = "exp_avg") -> Catalog:
    """One float32 state tensor a parameter, under ``optim``; chunk ``i`` of a tensor is in the file of rank ``i``."""
    tensors, storage, paths = {}, {}, {}
    for fqn, (shape, regions) in saved.items():
        key = f"optim.state.{fqn}.{name}"
        chunks = [ChunkStorageMetadata(torch.Size(r.offsets), torch.Size(r.sizes)) for r in regions]
        tensors[key] = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size(shape), chunks)
        paths[key] = ("optim", "state", fqn, name)
        for rank, region in enumerate(regions):
            storage[MetadataIndex(key, torch.Size(region.offsets))] = _StorageInfo(f"__{rank}_0.distcp", 0, 4096)
    metadata = Metadata(tensors, paths, storage)
    return build_catalog([(".metadata", parse_metadata(pickle.dumps(metadata), source=".metadata"))], location="ckpt")
