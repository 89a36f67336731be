"""A big checkpoint that costs no disk: real items written by torch.save, their zeros replaced by holes in the file."""

from __future__ import annotations

import io
import pickle
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

from shardferry.read.zip_header import parse_header


def write_sparse_checkpoint(path: Path, *, num_tensors: int, rows: int, columns: int) -> None:
    """``num_tensors`` parameters of zeros with one state each, under ``optim``, in one file."""
    buffer = io.BytesIO()
    torch.save(torch.zeros(rows, columns), buffer)
    item = buffer.getvalue()
    raw_start = parse_header(item[:4096]).raw_start
    raw_stop = raw_start + rows * columns * 4
    shape, origin = torch.Size((rows, columns)), torch.Size((0, 0))
    tensors, storage, paths = {}, {}, {}
    path.mkdir()
    with (path / "__0_0.distcp").open("wb") as file:
        for number in range(num_tensors):
            key = f"optim.state.layer{number}.weight.exp_avg"
            start = file.tell()
            file.write(item[:raw_start])
            file.seek(start + raw_stop)
            file.write(item[raw_stop:])
            chunk = ChunkStorageMetadata(origin, shape)
            tensors[key] = TensorStorageMetadata(TensorProperties(dtype=torch.float32), shape, [chunk])
            storage[MetadataIndex(key, origin)] = _StorageInfo("__0_0.distcp", start, len(item))
            paths[key] = ("optim", "state", f"layer{number}.weight", "exp_avg")
    (path / ".metadata").write_bytes(pickle.dumps(Metadata(tensors, paths, storage)))
