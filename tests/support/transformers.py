"""Catalogs and metadata of transformers that were saved over a mesh, without their data."""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from torch.distributed.tensor import Placement, Shard

from shardferry.checkpoint.build import build_catalog
from shardferry.checkpoint.catalog import Catalog
from shardferry.checkpoint.metadata import parse_metadata
from shardferry.layout.mesh import Mesh
from shardferry.layout.spec import Rule, SpecLayout
from shardferry.region import Region

STATES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")  # of AdamW with amsgrad
HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay", "amsgrad")
_OVERHEAD_BYTES = 1024  # of a saved item beside its data, about


@dataclass(frozen=True, slots=True)
class TransformerSize:
    """A decoder with grouped-query attention and a gated feed-forward layer."""

    layers: int
    hidden: int
    ffn: int
    kv: int
    vocab: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameters by FQN: nine a layer, and three."""
        hidden, ffn, kv = self.hidden, self.ffn, self.kv
        layer = {
            "attention.wq.weight": (hidden, hidden),
            "attention.wk.weight": (kv, hidden),
            "attention.wv.weight": (kv, hidden),
            "attention.wo.weight": (hidden, hidden),
            "feed_forward.w1.weight": (ffn, hidden),
            "feed_forward.w2.weight": (hidden, ffn),
            "feed_forward.w3.weight": (ffn, hidden),
            "attention_norm.weight": (hidden,),
            "ffn_norm.weight": (hidden,),
        }
        layers = {f"layers.{i}.{name}": shape for i in range(self.layers) for name, shape in layer.items()}
        ends = {"norm.weight": (hidden,), "output.weight": (self.vocab, hidden)}
        return {"tok_embeddings.weight": (self.vocab, hidden), **layers, **ends}


def tp_fsdp(mesh: Mesh) -> SpecLayout:
    """Tensor parallel as Llama's usual plan has it, FSDP2 over rows within, whatever else the mesh has replicates."""
    rows, columns = {"dp_shard": Shard(0), "tp": Shard(0)}, {"dp_shard": Shard(0), "tp": Shard(1)}
    rules = [("*.w[qkv].weight", rows), ("*.w[13].weight", rows), ("*.wo.weight", columns), ("*.w2.weight", columns)]
    rules += [("tok_embeddings.weight", columns), ("output.weight", rows)]

    def known(cut: Mapping[str, Placement]) -> dict[str, Placement]:
        return {axis: placement for axis, placement in cut.items() if axis in mesh.names}

    return SpecLayout(mesh, tuple(Rule(glob, known(cut)) for glob, cut in rules), known({"dp_shard": Shard(0)}))


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
