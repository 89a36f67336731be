"""Catalogs without files: made from torch's own metadata classes, through our own parser."""

from __future__ import annotations

import pickle
from collections import defaultdict
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

from shardferry.checkpoint.build import build_catalog
from shardferry.checkpoint.catalog import Catalog
from shardferry.checkpoint.metadata import parse_metadata
from shardferry.region import Region

Saved = Mapping[str, tuple[Sequence[int], Sequence[Region]]]  # FQN -> shape and chunks


def catalog_of(saved: Saved, *, name: str = "exp_avg") -> Catalog:
    """One float32 state tensor a parameter, under ``optim``; chunk ``i`` of a tensor is in the file of rank ``i``, behind
    that of the tensor before."""
    tensors, storage, paths = {}, {}, {}
    ends: dict[int, int] = defaultdict(int)  # of the ranks' files, bytes
    for fqn, (shape, regions) in saved.items():
        key = f"optim.state.{fqn}.{name}"
        chunks = [ChunkStorageMetadata(torch.Size(r.offsets), torch.Size(r.sizes)) for r in regions]
        tensors[key] = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size(shape), chunks)
        paths[key] = ("optim", "state", fqn, name)
        for rank, region in enumerate(regions):
            storage[MetadataIndex(key, torch.Size(region.offsets))] = _StorageInfo(
                f"__{rank}_0.distcp", ends[rank], _length(region)
            )
            ends[rank] += _length(region)
    metadata = Metadata(tensors, paths, storage)
    return build_catalog([(".metadata", parse_metadata(pickle.dumps(metadata), source=".metadata"))], location="ckpt")


def _length(region: Region) -> int:
    """Bytes of a saved item, its head among them."""
    return 4 * region.numel + 1024


def item_info(file: str, shape: Sequence[int]) -> _StorageInfo:
    """Where a float32 item is that is alone in its file."""
    return _StorageInfo(file, 0, _length(Region.whole(tuple(shape))))
