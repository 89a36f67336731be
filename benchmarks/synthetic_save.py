"""A ``.metadata`` as torch's collective save writes it, for models that no machine here could save.

The objects are torch's own, and shared among each other as torch leaves them: what a rank wrote came to the coordinator in a
message of its own, so that each rank's results have their own strings.
"""

from __future__ import annotations

import pickle
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

_STATES = ("exp_avg", "exp_avg_sq", "master")
_PIECE = 16  # elements of a piece along each dimension
_OVERHEAD_BYTES = 1536  # of a saved item, about


@dataclass(frozen=True, slots=True)
class SyntheticSave:
    """``num_parameters`` matrices, each state of each cut into a grid, the pieces spread over the files of all ranks."""

    num_parameters: int
    grid: tuple[int, ...]  # pieces along each dimension
    num_files: int

    @property
    def num_chunks(self) -> int:
        return self.num_parameters * len(_STATES) * torch.Size(self.grid).numel()

    def write(self, path: Path) -> int:
        """A checkpoint of metadata alone, in a directory that is made if need be; bytes of its ``.metadata``."""
        path.mkdir(exist_ok=True)
        return (path / ".metadata").write_bytes(pickle.dumps(self._metadata()))

    def _metadata(self) -> Metadata:
        metadata, ends = Metadata({}, {}, {}, version="1.0.0"), [0] * self.num_files
        shape = torch.Size(pieces * _PIECE for pieces in self.grid)
        corners = [tuple(place * _PIECE for place in corner) for corner in product(*map(range, self.grid))]
        sizes = (_PIECE,) * len(self.grid)
        length = torch.Size(sizes).numel() * 4 + _OVERHEAD_BYTES
        names = [f"__{rank}_0.distcp" for rank in range(self.num_files)]
        for row, (layer, state) in enumerate(product(range(self.num_parameters), _STATES)):
            fqn = f"model.layers.{layer}.feed_forward.w1.weight"
            key = f"optim.state.{fqn}.{state}"
            chunks = [ChunkStorageMetadata(torch.Size(corner), torch.Size(sizes)) for corner in corners]
            metadata.planner_data[key] = ("optim", "state", fqn, state)
            metadata.state_dict_metadata[key] = TensorStorageMetadata(
                TensorProperties(dtype=torch.float32), shape, chunks
            )
            for number, corner in enumerate(corners):
                rank = (row + number) % self.num_files
                index = MetadataIndex(_own_copy(key), torch.Size(corner), number)
                metadata.storage_data[index] = _StorageInfo(names[rank], ends[rank], length)
                ends[rank] += length
        return metadata


def _own_copy(text: str) -> str:
    return "".join(list(text))
