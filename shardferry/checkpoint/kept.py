"""State in the memory of loaders as a checkpoint: their manifests make an index, and the index makes a catalog.

::

    .kept      JSON: every tensor, its boxes, and where they are in the arenas; every value
    arena-3    the arena of rank 3: raw bytes
    values     what is not a tensor, one item of torch.save after the other
"""

from __future__ import annotations

import io
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from shardferry.checkpoint.build import build_catalog
from shardferry.checkpoint.catalog import Catalog
from shardferry.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageInfo,
    TensorProperties,
    TensorStorageMetadata,
)
from shardferry.region import Region, row_major_strides
from shardferry.storage.base import RangeReader, read_file

INDEX_FILE, VALUES_FILE = ".kept", "values"


def arena_file(rank: int, part: int) -> str:
    """The name of the file that stands for an arena.

    Args:
        part: of a rank that has several.
    """
    return f"arena-{rank}-{part}"


@dataclass(frozen=True, slots=True)
class KeptBox:
    """One box of a tensor, in some arena."""

    region: Region  # of the whole tensor
    file: str
    byte_offset: int  # of its first element
    strides: tuple[int, ...]  # of its elements, in elements


@dataclass
class KeptIndex:
    """What arenas hold. Fill it with `add_tensor` and `add_value`; the first of equal boxes counts."""

    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)  # by key
    objects: dict[str, dict[str, Any]] = field(default_factory=dict)  # by key
    values: io.BytesIO = field(default_factory=io.BytesIO)

    def add_tensor(
        self, path: Sequence[Any], dtype: torch.dtype, shape: Sequence[int], boxes: Sequence[KeptBox]
    ) -> None:
        """Add boxes of one tensor.

        Args:
            path: where it was in the nested state dict.
        """
        key = ".".join(map(str, path))
        tensor = self.tensors.setdefault(
            key, {"path": list(path), "dtype": str(dtype).removeprefix("torch."), "shape": list(shape), "boxes": {}}
        )
        for box in boxes:
            for region, byte_offset in _contiguous(box, dtype.itemsize):
                place = f"{region.offsets}{region.sizes}"
                tensor["boxes"].setdefault(place, [region.offsets, region.sizes, box.file, byte_offset])

    def add_value(self, path: Sequence[Any], value: Any) -> None:
        """Add what is not a tensor: plain data."""
        key = ".".join(map(str, path))
        if key in self.objects:
            return
        start = self.values.tell()
        torch.save(value, self.values)
        self.objects[key] = {"path": list(path), "byte_offset": start, "nbytes": self.values.tell() - start}

    def files(self) -> dict[str, bytes]:
        """Index and values, by file name."""
        tensors = {key: {**tensor, "boxes": list(tensor["boxes"].values())} for key, tensor in self.tensors.items()}
        index = json.dumps({"tensors": tensors, "objects": self.objects}).encode()
        return {INDEX_FILE: index, VALUES_FILE: self.values.getvalue()}


def _contiguous(box: KeptBox, itemsize: int) -> Iterator[tuple[Region, int]]:
    """The parts of a box whose elements lie row-major, one after the other, with the byte offset of each."""
    sizes = box.region.sizes
    if box.region.numel == 0:
        return
    wanted = row_major_strides(sizes)
    split = max((dim + 1 for dim, size in enumerate(sizes) if size > 1 and box.strides[dim] != wanted[dim]), default=0)
    for at in itertools.product(*map(range, sizes[:split])):
        offsets = tuple(o + i for o, i in zip(box.region.offsets, [*at, *[0] * (len(sizes) - split)], strict=True))
        start = sum(i * stride for i, stride in zip(at, box.strides, strict=False))
        yield Region(offsets, (*[1] * split, *sizes[split:])), box.byte_offset + start * itemsize


def open_kept(storage: RangeReader, names: Sequence[str]) -> Catalog | None:
    """The catalog of kept state; None if the files are of another format. Raises StorageError."""
    if INDEX_FILE not in names:
        return None
    index: Mapping[str, Any] = json.loads(read_file(storage, INDEX_FILE))
    metadata = Metadata()  # as a DCP writer would have left it
    metadata.version = "kept"
    metadata.state_dict_metadata, metadata.storage_data, metadata.planner_data = {}, {}, {}
    for key, saved in index["tensors"].items():
        tensor = TensorStorageMetadata()
        tensor.properties = TensorProperties()
        tensor.properties.dtype = dtype = getattr(torch, saved["dtype"])
        tensor.size = tuple(saved["shape"])
        tensor.chunks = []
        for offsets, sizes, file, byte_offset in saved["boxes"]:
            tensor.chunks.append(ChunkStorageMetadata([{"offsets": tuple(offsets), "sizes": tuple(sizes)}]))
            nbytes = math.prod(sizes) * dtype.itemsize
            place = {"relative_path": file, "offset": byte_offset, "length": nbytes, "is_raw": True}
            metadata.storage_data[MetadataIndex([{"fqn": key, "offset": tuple(offsets)}])] = StorageInfo([place])
        metadata.state_dict_metadata[key] = tensor
        metadata.planner_data[key] = tuple(saved["path"])
    for key, saved in index["objects"].items():
        metadata.state_dict_metadata[key] = BytesStorageMetadata()
        place = {"relative_path": VALUES_FILE, "offset": saved["byte_offset"], "length": saved["nbytes"]}
        metadata.storage_data[MetadataIndex([{"fqn": key}])] = StorageInfo([place])
        metadata.planner_data[key] = tuple(saved["path"])
    return build_catalog([(storage.location, metadata)], location=storage.location)
