"""What a checkpoint's metadata is turned into: every saved chunk's file, byte position, length, dtype and box.

The catalog is columnar (one NumPy array a property, one row a chunk): it is small, opens quickly, and travels between
processes without being rebuilt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from shardferry.checkpoint.item_format import ItemFormat
from shardferry.region import Region

NO_FILE = -1  # in Catalog.chunk_file: the metadata lists the chunk, but not where it was stored

KeyPath = tuple[str | int, ...]  # where a key's value stood in the nested state dict that was saved


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """One tensor of the checkpoint; its chunks are the rows ``chunks`` of the catalog's columns."""

    key: str  # as in the metadata: "optim.state.layers.0.wq.weight.exp_avg"
    shape: tuple[int, ...]  # of the whole tensor, elements
    dtype: torch.dtype
    chunks: range
    boxes_start: int  # first entry of its first chunk in box_offsets and box_sizes; ndim entries a chunk

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class SavedObject:
    """One saved Python object (a hyperparameter, say): a whole item."""

    key: str
    file: int  # row of Catalog.files
    byte_offset: int
    byte_length: int
    format: ItemFormat


@dataclass(frozen=True)
class Catalog:
    """What a checkpoint holds."""

    location: str
    torch_metadata_version: str
    files: tuple[str, ...]  # relative to the location
    tensors: Mapping[str, SavedTensor]
    objects: Mapping[str, SavedObject]
    paths: Mapping[str, KeyPath] | None  # None: saved without flattening
    chunk_file: np.ndarray  # int32[num_chunks], row of files, or NO_FILE
    chunk_byte_offset: np.ndarray  # int64[num_chunks], of the item in its file
    chunk_byte_length: np.ndarray  # int64[num_chunks], of the item
    box_offsets: np.ndarray  # int64, elements
    box_sizes: np.ndarray  # int64, elements
    chunk_format: np.ndarray  # int16[num_chunks], row of formats
    formats: tuple[ItemFormat, ...]
    file_bytes: Mapping[str, int] = field(
        default_factory=dict
    )  # by name, as far as the storage told when it was opened
    file_versions: Mapping[str, str] = field(default_factory=dict)  # alike: an etag, a time; see RangeReader.versions
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)  # for fsspec; may hold credentials
    problems: tuple[str, ...] = field(default=())

    @property
    def num_chunks(self) -> int:
        return len(self.chunk_file)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, each element once, without the items' overhead."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def boxes(self, tensor: SavedTensor) -> tuple[np.ndarray, np.ndarray]:
        """Offsets and sizes of a tensor's chunks, each ``int64[num_chunks, ndim]``."""
        shape = (len(tensor.chunks), len(tensor.shape))
        rows = slice(tensor.boxes_start, tensor.boxes_start + math.prod(shape))
        return self.box_offsets[rows].reshape(shape), self.box_sizes[rows].reshape(shape)

    def region(self, tensor: SavedTensor, chunk: int) -> Region:
        """The box of one chunk (a row of the catalog) of a tensor."""
        offsets, sizes = self.boxes(tensor)
        row = chunk - tensor.chunks.start
        return Region(tuple(offsets[row].tolist()), tuple(sizes[row].tolist()))

    def path(self, key: str) -> KeyPath:
        """Where a key's value stood in the nested state dict; the key itself where that was not recorded."""
        return (self.paths or {}).get(key, (key,))
