"""Prove from a catalog alone that each wanted element is in exactly one saved chunk; name holes and overlaps."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from shardferry.checkpoint.catalog import NO_FILE, Catalog, SavedTensor
from shardferry.errors import PlanError
from shardferry.region import Region, first_overlap, tile, uncovered


def covering_chunks(catalog: Catalog, saved: SavedTensor, wanted: Region) -> list[tuple[int, Region]]:
    """The saved chunks that together hold each element of a region exactly once.

    Args:
        wanted: elements of the whole tensor.

    Returns:
        For each chunk: its row in the catalog, and its box in elements of the whole tensor.

    Raises:
        PlanError: an element is in no stored chunk (a hole), or in two (an overlap).
    """
    chunks = (saved.chunks[row] for row in _covering_rows(catalog, saved, wanted))
    return [(chunk, catalog.region(saved, chunk)) for chunk in chunks]


def check_cover(catalog: Catalog, tensors: Iterable[SavedTensor]) -> None:
    """Prove that each element of some tensors is saved exactly once. Tensors with identical chunks are checked once.

    Raises:
        PlanError: a hole or an overlap.
    """
    proven: set[tuple[object, ...]] = set()
    for saved in tensors:
        chunks = (saved.shape, *identity_of_chunks(catalog, saved))
        if chunks not in proven:
            _covering_rows(catalog, saved, Region.whole(saved.shape))
            proven.add(chunks)


def find_problems(catalog: Catalog) -> list[str]:
    """Each hole, overlap and unstored chunk that a checkpoint's metadata shows, as messages."""
    problems = list(catalog.problems)
    for saved in catalog.tensors.values():
        try:
            _covering_rows(catalog, saved, Region.whole(saved.shape))
        except PlanError as error:
            problems.append(str(error))
    return problems


def identity_of_chunks(catalog: Catalog, saved: SavedTensor) -> tuple[bytes, bytes, bytes]:
    """Equal for two tensors whose chunks have the same boxes, of which the same ones are stored."""
    offsets, sizes = catalog.boxes(saved)
    return offsets.tobytes(), sizes.tobytes(), _is_stored(catalog, saved).tobytes()


def _covering_rows(catalog: Catalog, saved: SavedTensor, wanted: Region) -> list[int]:
    """As `covering_chunks`: rows among the tensor's chunks."""
    offsets, sizes = catalog.boxes(saved)
    starts = np.maximum(offsets, wanted.offsets)
    lengths = np.minimum(offsets + sizes, wanted.ends) - starts
    rows = np.flatnonzero((lengths > 0).all(axis=1) & _is_stored(catalog, saved))
    starts, lengths = starts[rows], lengths[rows]
    if not tile(starts, lengths, wanted):
        overlap = first_overlap(starts, lengths)
        if overlap is not None:
            raise _overlap_error(catalog, saved, [saved.chunks[rows[row]] for row in overlap])
        raise _hole_error(catalog, saved, wanted, [saved.chunks[row] for row in rows])
    found: list[int] = rows.tolist()
    return found


def _is_stored(catalog: Catalog, saved: SavedTensor) -> np.ndarray:
    """Which of a tensor's chunks are in a file: ``bool[num_chunks]``."""
    stored: np.ndarray = catalog.chunk_file[saved.chunks.start : saved.chunks.stop] != NO_FILE
    return stored


def _overlap_error(catalog: Catalog, saved: SavedTensor, chunks: list[int]) -> PlanError:
    one, other = (catalog.region(saved, chunk) for chunk in chunks)
    files = [catalog.files[catalog.chunk_file[chunk]] for chunk in chunks]
    return PlanError(
        f"{saved.key}: {one.intersect(other)} is saved twice, in {files[0]} as part of {one} and in {files[1]} as part of "
        f"{other}; which one is right can't be known. Save again with a writer that removes duplicates."
    )


def _hole_error(catalog: Catalog, saved: SavedTensor, wanted: Region, chunks: list[int]) -> PlanError:
    holes = uncovered(wanted, (catalog.region(saved, chunk) for chunk in chunks))
    missing = sum(hole.numel for hole in holes)
    return PlanError(
        f"{saved.key}: {missing} of {wanted.numel} wanted elements are in no saved chunk, first at {holes[0]} of the shape "
        f"{saved.shape}; the checkpoint {catalog.location} is incomplete. Use another checkpoint or save again."
    )
