"""Turn a model's shapes and a saving mesh into the catalog that its checkpoint would give, without any file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from shardferry.checkpoint.catalog import Catalog, SavedObject, SavedTensor, ZipItem
from shardferry.layout.mesh import Mesh, Placement, Replicate, Shard
from shardferry.layout.spec import Rule, SpecLayout
from shardferry.layout.tensor_layout import AxisCut, sharded
from shardferry.state_dicts import KeyPath

ITEM_OVERHEAD = 1024  # bytes of a saved item beside its data: what torch.save's zip has, about
OPTIMIZER_KEY = "optim"
Placements = Mapping[str, Placement]


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
        shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (self.vocab, hidden)}
        for layer in range(self.layers):
            at = f"layers.{layer}."
            shapes |= {
                f"{at}attention.wq.weight": (hidden, hidden),
                f"{at}attention.wk.weight": (kv, hidden),
                f"{at}attention.wv.weight": (kv, hidden),
                f"{at}attention.wo.weight": (hidden, hidden),
                f"{at}feed_forward.w1.weight": (ffn, hidden),
                f"{at}feed_forward.w2.weight": (hidden, ffn),
                f"{at}feed_forward.w3.weight": (ffn, hidden),
                f"{at}attention_norm.weight": (hidden,),
                f"{at}ffn_norm.weight": (hidden,),
            }
        return shapes | {"norm.weight": (hidden,), "output.weight": (self.vocab, hidden)}


LLAMA_405B = TransformerSize(layers=126, hidden=16384, ffn=53248, kv=1024, vocab=128256)
STATES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")  # of AdamW with amsgrad
HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay", "amsgrad")


def tp_fsdp(mesh: Mesh) -> SpecLayout:
    """Tensor parallel as Llama's usual plan has it, FSDP2 over rows within, whatever else the mesh has replicates."""
    rows, columns = {"dp_shard": Shard(0), "tp": Shard(0)}, {"dp_shard": Shard(0), "tp": Shard(1)}
    rules = [("*.w[qkv].weight", rows), ("*.w[13].weight", rows), ("*.wo.weight", columns), ("*.w2.weight", columns)]
    rules += [("tok_embeddings.weight", columns), ("output.weight", rows)]

    def known(cut: Placements) -> Placements:
        return {axis: placement for axis, placement in cut.items() if axis in mesh.names}

    return SpecLayout(mesh, tuple(Rule(glob, known(cut)) for glob, cut in rules), known({"dp_shard": Shard(0)}))


def synthetic_catalog(
    size: TransformerSize, saved: SpecLayout, *, states: Sequence[str] = STATES, location: str = "synthetic"
) -> Catalog:
    """What `open_checkpoint` would give for AdamW's flattened state as ``dcp.save`` writes it from every rank of a spec.

    Each rank writes one file; of replicas the first rank writes. Steps and hyperparameters are written by rank 0.
    """
    writer = _Writer(location, saved.world_size)
    for fqn, shape in size.shapes().items():
        offsets, sizes, ranks = _chunks(saved, fqn, shape)
        for name in states:
            writer.add_tensor(f"state.{fqn}.{name}", shape, offsets, sizes, ranks)
        scalar = np.zeros((1, 0), dtype=np.int64)
        writer.add_tensor(f"state.{fqn}.step", (), scalar, scalar, np.zeros(1, dtype=np.int32))
        for name in HYPERPARAMETERS:
            writer.add_object(f"param_groups.{fqn}.{name}", nbytes=64)
    return writer.catalog()


def _chunks(spec: SpecLayout, fqn: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes that have elements, each once, and who writes them. One row a chunk."""
    placements = spec.placements(fqn)
    assert placements is not None
    ranges = [range(1 if isinstance(p, Replicate) else n) for p, (_, n) in zip(placements, spec.mesh.axes, strict=True)]
    regions, ranks = [], []
    for coordinate in product(*ranges):
        rank = 0
        for (_, num_ranks), index in zip(spec.mesh.axes, coordinate, strict=True):
            rank = rank * num_ranks + index
        cuts = [AxisCut(n, i, p) for (_, n), i, p in zip(spec.mesh.axes, coordinate, placements, strict=True)]
        for box in sharded(shape, cuts).boxes:
            regions.append((box.region.offsets, box.region.sizes))
            ranks.append(rank)
    offsets, sizes = (np.array(column, dtype=np.int64) for column in zip(*regions, strict=True))
    return offsets, sizes, np.array(ranks, dtype=np.int32)


class _Writer:
    """Appends items to the files of ranks, and keeps the columns."""

    def __init__(self, location: str, num_files: int) -> None:
        self._location = location
        self._ends = np.zeros(num_files, dtype=np.int64)  # bytes, of each file
        self._tensors: dict[str, SavedTensor] = {}
        self._objects: dict[str, SavedObject] = {}
        self._paths: dict[str, KeyPath] = {}
        self._columns: list[tuple[np.ndarray, ...]] = []
        self._num_chunks = self._num_entries = 0

    def add_tensor(
        self, name: str, shape: tuple[int, ...], offsets: np.ndarray, sizes: np.ndarray, ranks: np.ndarray
    ) -> None:
        key = self._key(name)
        chunks = range(self._num_chunks, self._num_chunks + len(ranks))
        self._tensors[key] = SavedTensor(key, shape, torch.float32, chunks, self._num_entries)
        lengths = np.prod(sizes, axis=1, dtype=np.int64) * 4 + ITEM_OVERHEAD
        self._columns.append((ranks, self._ends[ranks], lengths, offsets.ravel(), sizes.ravel()))
        self._ends[ranks] += lengths
        self._num_chunks += len(ranks)
        self._num_entries += offsets.size

    def add_object(self, name: str, *, nbytes: int) -> None:
        key = self._key(name)
        length = nbytes + ITEM_OVERHEAD
        self._objects[key] = SavedObject(key, 0, int(self._ends[0]), length, ZipItem())
        self._ends[0] += length

    def _key(self, name: str) -> str:
        key = f"{OPTIMIZER_KEY}.{name}"
        self._paths[key] = (OPTIMIZER_KEY, name)
        return key

    def catalog(self) -> Catalog:
        files, byte_offsets, lengths, offsets, sizes = map(np.concatenate, zip(*self._columns, strict=True))
        return Catalog(
            location=self._location,
            torch_metadata_version="1.1.0",
            files=tuple(f"__{rank}_0.distcp" for rank in range(len(self._ends))),
            tensors=self._tensors,
            objects=self._objects,
            paths=self._paths,
            chunk_file=files,
            chunk_byte_offset=byte_offsets,
            chunk_byte_length=lengths,
            box_offsets=offsets,
            box_sizes=sizes,
            chunk_format=np.zeros(len(files), dtype=np.int16),
            formats=(ZipItem(),),
        )
