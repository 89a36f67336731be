"""A ``.metadata`` as torch's collective save writes it, for models that no machine here could save.

The objects are torch's own, and shared among each other as torch leaves them: what a rank wrote came to the coordinator in a
message of its own, so that each rank's results have their own strings.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

STATES = ("exp_avg", "exp_avg_sq", "master")
_OVERHEAD_BYTES = 1536  # of a saved item, about


@dataclass(frozen=True, slots=True)
class SyntheticSave:
    """``num_parameters`` matrices, each state of each cut into a grid, the pieces spread over the files of all ranks."""

    num_parameters: int
    grid: tuple[int, ...]  # pieces along each dimension
    num_files: int
    states: tuple[str, ...] = STATES
    piece: int = 16  # elements of a piece along each dimension

    @property
    def num_chunks(self) -> int:
        return self.num_parameters * len(self.states) * torch.Size(self.grid).numel()

    def keys(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Each tensor's key and its path."""
        for layer, state in product(range(self.num_parameters), self.states):
            fqn = f"model.layers.{layer}.feed_forward.w1.weight"
            yield f"optim.state.{fqn}.{state}", ("optim", "state", fqn, state)

    def metadata(self) -> Metadata:
        """In torch's classes."""
        tensors, storage, paths = {}, {}, dict(self.keys())
        shape = torch.Size(pieces * self.piece for pieces in self.grid)
        sizes = (self.piece,) * len(self.grid)
        corners = [tuple(place * self.piece for place in corner) for corner in product(*map(range, self.grid))]
        length = torch.Size(sizes).numel() * 4 + _OVERHEAD_BYTES
        names, ends = [f"__{rank}_0.distcp" for rank in range(self.num_files)], [0] * self.num_files
        for row, key in enumerate(paths):
            chunks = [ChunkStorageMetadata(torch.Size(corner), torch.Size(sizes)) for corner in corners]
            tensors[key] = TensorStorageMetadata(TensorProperties(dtype=torch.float32), shape, chunks)
            for number, corner in enumerate(corners):
                rank = (row + number) % self.num_files
                index = MetadataIndex(_own_copy(key), torch.Size(corner), number)
                storage[index] = _StorageInfo(names[rank], ends[rank], length)
                ends[rank] += length
        return Metadata(tensors, paths, storage, version="1.0.0")

    def pickled(self) -> bytes:
        """As it stands in the file."""
        return pickle.dumps(self.metadata())

    def write(self, path: Path) -> int:
        """A checkpoint of metadata alone, in a directory that is made if need be; bytes of its ``.metadata``."""
        path.mkdir(exist_ok=True)
        return (path / ".metadata").write_bytes(self.pickled())


def _own_copy(text: str) -> str:
    return "".join(list(text))
