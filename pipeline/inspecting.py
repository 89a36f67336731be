"""What is in a checkpoint: the JSON of ``shardferry inspect --json``."""

from __future__ import annotations

from collections import Counter

import numpy as np
from pydantic import BaseModel, ConfigDict

from shardferry.checkpoint.catalog import Catalog, SavedTensor
from shardferry.checkpoint.optimizer_state import top_level_keys
from shardferry.plan.planner import find_problems


class TensorReport(BaseModel):
    """One saved tensor."""

    model_config = ConfigDict(frozen=True)

    fqn: str
    shape: list[int]
    dtype: str
    num_chunks: int
    nbytes: int
    grid: list[int]  # how many chunks along each dimension


class InspectReport(BaseModel):
    """One checkpoint."""

    model_config = ConfigDict(frozen=True)

    location: str
    torch_metadata_version: str
    top_level_keys: list[str]
    num_tensors: int
    num_objects: int
    num_chunks: int
    num_files: int
    total_bytes: int
    topology: dict[str, int]  # how tensors were cut when saved, in words: number of tensors
    tensors: list[TensorReport]
    problems: list[str]


def inspect_report(catalog: Catalog) -> InspectReport:
    """Look at the metadata alone."""
    tensors = [_tensor(catalog, saved) for saved in catalog.tensors.values()]
    return InspectReport(
        location=catalog.location,
        torch_metadata_version=catalog.torch_metadata_version,
        top_level_keys=top_level_keys(catalog),
        num_tensors=len(tensors),
        num_objects=len(catalog.objects),
        num_chunks=catalog.num_chunks,
        num_files=len(catalog.files),
        total_bytes=catalog.total_bytes,
        topology=dict(Counter(_cut(tensor.grid) for tensor in tensors).most_common()),
        tensors=tensors,
        problems=find_problems(catalog),
    )


def _tensor(catalog: Catalog, saved: SavedTensor) -> TensorReport:
    offsets, _ = catalog.boxes(saved)
    return TensorReport(
        fqn=saved.key,
        shape=list(saved.shape),
        dtype=str(saved.dtype).removeprefix("torch."),
        num_chunks=len(saved.chunks),
        nbytes=saved.nbytes,
        grid=[len(np.unique(offsets[:, dim])) for dim in range(len(saved.shape))],
    )


def _cut(grid: list[int]) -> str:
    cuts = [f"dim {dim} in {parts}" for dim, parts in enumerate(grid) if parts > 1]
    return ", ".join(cuts) or "whole"
