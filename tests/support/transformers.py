"""Catalogs and metadata of transformers that were saved over a mesh, without their data."""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Mapping, Sequence
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

from benchmarks.large import HYPERPARAMETERS, STATES, TransformerSize
from shardferry.checkpoint.build import build_catalog
from shardferry.checkpoint.catalog import Catalog
from shardferry.checkpoint.metadata import parse_metadata
from shardferry.layout.spec import SpecLayout
from shardferry.region import Region

_OVERHEAD_BYTES = 1024  # of a saved item beside its data, about


def synthetic_metadata(size: TransformerSize, saved: SpecLayout, *, states: Sequence[str] = STATES) -> Metadata:
    """Of AdamW's flattened state as ``dcp.save`` writes it from every rank of a spec.

    Each rank writes one file; of replicas the first rank writes. Steps and hyperparameters are written by rank 0.
    """
    writer = _Writer()
    ranks = [saved.rank(rank) for rank in range(saved.world_size)]
    for fqn, shape in size.shapes().items():
        writers: dict[Region, int] = {}
        for rank, layout in enumerate(ranks):
            for box in layout.parameter(fqn, shape).boxes:
                writers.setdefault(box.region, rank)
        for state in states:
            writer.add_tensor(f"state.{fqn}.{state}", shape, writers)
        writer.add_tensor(f"state.{fqn}.step", (), {Region((), ()): 0})
        for name in HYPERPARAMETERS:
            writer.add_object(f"param_groups.{fqn}.{name}", nbytes=64)
    return writer.metadata


class _Writer:
    """Appends items to the files of ranks, and lists them."""

    def __init__(self) -> None:
        self.metadata = Metadata({}, {}, {})
        self._ends: dict[int, int] = defaultdict(int)  # of the ranks' files, bytes

    def add_tensor(self, name: str, shape: tuple[int, ...], writers: Mapping[Region, int]) -> None:
        """A float32 tensor, whose chunks are written by these ranks."""
        chunks = [ChunkStorageMetadata(torch.Size(r.offsets), torch.Size(r.sizes)) for r in writers]
        properties = TensorProperties(dtype=torch.float32)
        key = self._add(name, TensorStorageMetadata(properties, torch.Size(shape), chunks))
        for region, rank in writers.items():
            self._append(MetadataIndex(key, torch.Size(region.offsets)), rank, 4 * region.numel)

    def add_object(self, name: str, *, nbytes: int) -> None:
        """A value that is no tensor, written by rank 0."""
        self._append(MetadataIndex(self._add(name, BytesStorageMetadata())), 0, nbytes)

    def _add(self, name: str, entry: TensorStorageMetadata | BytesStorageMetadata) -> str:
        key = f"optim.{name}"
        self.metadata.state_dict_metadata[key] = entry
        self.metadata.planner_data[key] = ("optim", name)
        return key

    def _append(self, index: MetadataIndex, rank: int, nbytes: int) -> None:
        length = nbytes + _OVERHEAD_BYTES
        self.metadata.storage_data[index] = _StorageInfo(f"__{rank}_0.distcp", self._ends[rank], length)
        self._ends[rank] += length


def synthetic_catalog(size: TransformerSize, saved: SpecLayout, *, states: Sequence[str] = STATES) -> Catalog:
    """What `open_checkpoint` would give for `synthetic_metadata`."""
    pickled = pickle.dumps(synthetic_metadata(size, saved, states=states))
    return build_catalog([(".metadata", parse_metadata(pickled, source=".metadata"))], location="synthetic")


def write_metadata(size: TransformerSize, saved: SpecLayout, directory: Path) -> Path:
    """What somebody has who copied one file out of a large checkpoint. Returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / ".metadata").write_bytes(pickle.dumps(synthetic_metadata(size, saved)))
    return directory
