"""Prove of torch's own metadata that saved chunks hold each wanted element exactly once."""

from __future__ import annotations

import numpy as np
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from shardferry.errors import PlanError
from shardferry.region import Region, first_overlap, uncovered


def check_cover(key: str, saved: TensorStorageMetadata, wanted: Region) -> None:
    """Raises PlanError: an element of ``wanted`` is in no saved chunk, or in two."""
    shape = (len(saved.chunks), len(saved.size))
    offsets = np.array([tuple(chunk.offsets) for chunk in saved.chunks], dtype=np.int64).reshape(shape)
    sizes = np.array([tuple(chunk.sizes) for chunk in saved.chunks], dtype=np.int64).reshape(shape)
    starts = np.maximum(offsets, wanted.offsets)
    lengths = np.minimum(offsets + sizes, wanted.ends) - starts
    rows = np.flatnonzero((lengths > 0).all(axis=1))
    parts = [Region(tuple(starts[row].tolist()), tuple(lengths[row].tolist())) for row in rows]
    overlap = first_overlap(starts[rows], lengths[rows])
    if overlap is not None:
        one, other = (parts[row] for row in overlap)
        raise PlanError(
            f"{key}: {one.intersect(other)} is saved twice; which one is right can't be known. "
            "Save again with a writer that removes duplicates."
        )
    if sum(part.numel for part in parts) != wanted.numel:
        holes = uncovered(wanted, parts)
        raise PlanError(
            f"{key}: {sum(hole.numel for hole in holes)} of {wanted.numel} wanted elements are in no saved chunk, first at "
            f"{holes[0]} of the shape {tuple(saved.size)}; the checkpoint is incomplete. Use another one or save again."
        )
