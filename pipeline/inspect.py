"""Report the content of a checkpoint from its catalog."""

from __future__ import annotations

from collections import Counter

import numpy as np

from shardferry.checkpoint.catalog import Catalog, SavedTensor
from shardferry.checkpoint.optimizer_state import top_level_keys
from shardferry.plan.cover import find_problems
from shardferry.schemas.inspect_report import InspectReport, TensorReport


def inspect_report(catalog: Catalog) -> InspectReport:
    """Report tensors, sizes, versions, the topology at the time of saving, and problems. Reads no data."""
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
        topology=dict(Counter(_sharding(tensor.grid) for tensor in tensors).most_common()),
        tensors=tensors,
        problems=find_problems(catalog),
        warnings=[catalog.stale] if catalog.stale else [],
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


def _sharding(grid: list[int]) -> str:
    parts_by_dim = [f"dim {dim} in {parts}" for dim, parts in enumerate(grid) if parts > 1]
    return ", ".join(parts_by_dim) or "whole"
