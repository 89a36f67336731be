"""The catalog of a checkpoint: the file, byte range, format, dtype and box of every saved chunk.

The catalog is columnar: one NumPy array per property, one row per chunk. So it is small, opens quickly, and travels between
processes without being rebuilt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from shardferry.region import Region
from shardferry.state_dicts import KeyPath

NO_FILE = -1  # in Catalog.chunk_file: the metadata lists the chunk, but no file holds it


@dataclass(frozen=True, slots=True)
class ZipItem:
    """A zip archive as ``torch.save`` writes it. Its header says where the raw bytes are, and gives their strides."""


@dataclass(frozen=True, slots=True)
class RawItem:
    """The raw bytes of a tensor and nothing else, row-major: a tensor of a safetensors file."""


@dataclass(frozen=True, slots=True)
class TransformedItem:
    """A zip item whose whole byte stream was transformed, e.g. compressed. It can only be read as a whole."""

    descriptors: tuple[str, ...]  # as the writer recorded them: "stream.zstd/1"


@dataclass(frozen=True, slots=True, eq=False)
class KnownValue:
    """A value that was read from another file (Megatron's ``common.pt``) when the checkpoint was opened. No item holds it."""

    value: Any


ItemFormat = ZipItem | RawItem | TransformedItem | KnownValue  # how the bytes of a saved item are stored


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """One tensor of the checkpoint. Its chunks are the rows ``chunks`` of the catalog's columns."""

    key: str  # as in the metadata: "optim.state.layers.0.wq.weight.exp_avg"
    shape: tuple[int, ...]  # of the whole tensor, elements
    dtype: torch.dtype
    chunks: range
    boxes_start: int  # index of its first chunk in box_offsets and box_sizes, which have ndim entries per chunk

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class SavedObject:
    """One saved Python object, e.g. a hyperparameter: a whole item."""

    key: str
    file: int  # row of Catalog.files
    byte_offset: int  # of the item in its file
    byte_length: int  # of the item
    format: ItemFormat


@dataclass(frozen=True)
class Catalog:
    """Everything that a checkpoint holds."""

    location: str
    torch_metadata_version: str
    files: tuple[str, ...]  # relative to the location
    tensors: Mapping[str, SavedTensor]  # by key
    objects: Mapping[str, SavedObject]  # by key
    paths: Mapping[str, KeyPath] | None  # by key; None: not recorded
    chunk_file: np.ndarray  # int32[num_chunks], row of files, or NO_FILE
    chunk_byte_offset: np.ndarray  # int64[num_chunks], of the item in its file
    chunk_byte_length: np.ndarray  # int64[num_chunks], of the item
    box_offsets: np.ndarray  # int64[sum of ndim over all chunks], elements
    box_sizes: np.ndarray  # int64[sum of ndim over all chunks], elements
    chunk_format: np.ndarray  # int16[num_chunks], row of formats
    formats: tuple[ItemFormat, ...]
    file_bytes: Mapping[str, int] = field(default_factory=dict)  # size by file name, where the storage told it
    file_versions: Mapping[str, str] = field(default_factory=dict)  # by file name; see RangeReader.versions
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)  # may hold credentials
    model_location: str = ""  # of the checkpoint that has the weights, where that is another one
    stale: str = ""  # why data files may be of a later save than the metadata, in words
    problems: tuple[str, ...] = field(default=())  # what is missing or can't be loaded, in words

    @property
    def num_chunks(self) -> int:
        """Saved chunks of all tensors."""
        return len(self.chunk_file)

    @property
    def weights_location(self) -> str:
        """Where the weights are."""
        return self.model_location or self.location

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, each element once, without the overhead of items."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def boxes(self, tensor: SavedTensor) -> tuple[np.ndarray, np.ndarray]:
        """Offsets and sizes of a tensor's chunks in elements, each ``int64[num_chunks, ndim]``."""
        shape = (len(tensor.chunks), len(tensor.shape))
        rows = slice(tensor.boxes_start, tensor.boxes_start + math.prod(shape))
        return self.box_offsets[rows].reshape(shape), self.box_sizes[rows].reshape(shape)

    def region(self, tensor: SavedTensor, chunk: int) -> Region:
        """The box of one chunk of a tensor.

        Args:
            chunk: a row of the catalog, one of ``tensor.chunks``.
        """
        offsets, sizes = self.boxes(tensor)
        row = chunk - tensor.chunks.start
        return Region(tuple(offsets[row].tolist()), tuple(sizes[row].tolist()))

    def path(self, key: str) -> KeyPath:
        """Where a key's value was in the nested state dict; the key itself where that was not recorded."""
        return (self.paths or {}).get(key, (key,))
