"""Turn a catalog and a spec into the bytes that every rank wants, for all ranks at once and without planning any.

A model has a dozen shapes, each placed in one way, and thousands of tensors. Boxes are worked out once for each such class,
as columns with one row a rank, and counted as often as the class has tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch.distributed.tensor import Placement, Replicate

from shardferry.checkpoint.catalog import NO_FILE, Catalog, SavedTensor
from shardferry.config import LoadRequest
from shardferry.layout.mesh import Mesh
from shardferry.layout.spec import MeshBoxes, SpecLayout, ranks_at
from shardferry.plan.load_plan import PlannedTensor
from shardferry.plan.planner import ALIGNMENT, wanted_tensors

_PAIRS = 1 << 21  # of boxes, compared at a time


@dataclass(frozen=True)
class Demand:
    """What the ranks of a spec want of a checkpoint; Python objects, which rank 0 reads for all, apart."""

    needed: np.ndarray  # int64[world_size], bytes of each rank's boxes
    arena: np.ndarray  # int64[world_size], bytes
    unique: int  # bytes that some rank wants, each once
    of_files: np.ndarray  # int64[num_files], the unique bytes by the file that they are in
    twins: np.ndarray  # int64[world_size], the lowest rank that wants the very same boxes
    num_tensors: int  # that some rank wants


def demand_of(catalog: Catalog, layout: SpecLayout, request: LoadRequest) -> Demand:
    """Count what all ranks want. Raises PlanError, LayoutError as `plan_load` does; that each element is saved is not checked."""
    world_size = layout.world_size
    needed, arena = np.zeros(world_size, dtype=np.int64), np.zeros(world_size, dtype=np.int64)
    of_files = np.zeros(len(catalog.files), dtype=np.float64)
    unique, num_tensors, marks = 0, 0, []
    for alike in _classes(catalog, layout, request):
        boxes = _boxes_of_ranks(layout.mesh, alike)
        numel = np.prod(boxes[:, 1], axis=1, dtype=np.int64)
        boxes[numel == 0] = 0
        distinct, mark = np.unique(boxes.reshape(world_size, -1), axis=0, return_inverse=True)
        distinct = distinct.reshape(-1, *boxes.shape[1:])
        marks.append(mark.reshape(-1))
        num_tensors += len(alike.tensors)
        nbytes = numel * alike.itemsize
        needed += nbytes * len(alike.tensors)
        arena += -(-nbytes // ALIGNMENT) * ALIGNMENT * len(alike.tensors)
        held = distinct[np.prod(distinct[:, 1], axis=1, dtype=np.int64) > 0]
        unique += int(np.prod(held[:, 1], axis=1, dtype=np.int64).sum()) * alike.itemsize * len(alike.tensors)
        of_files += _bytes_of_files(catalog, alike, held)
    return Demand(needed, arena, unique, of_files.astype(np.int64), _twins(marks, world_size), num_tensors)


@dataclass(frozen=True, slots=True)
class _Alike:
    """Tensors of one shape that are saved in the same boxes and wanted in the same boxes."""

    shape: tuple[int, ...]
    placements: tuple[Placement, ...]
    kept_to: tuple[tuple[int, ...] | None, ...]
    itemsize: int
    tensors: list[SavedTensor] = field(default_factory=list)


def _classes(catalog: Catalog, layout: SpecLayout, request: LoadRequest) -> Iterator[_Alike]:
    classes: dict[tuple[object, ...], _Alike] = {}
    for tensor in _tensors(catalog, layout, request):
        saved = catalog.tensors[tensor.key]
        placements = tensor.layout.placements or (Replicate(),) * len(layout.mesh.axes)
        kept_to = layout.holder_coordinates(tensor.fqn)
        boxes = (column.tobytes() for column in catalog.boxes(saved))
        alike = (saved.shape, placements, kept_to, saved.dtype, *boxes)
        known = classes.get(alike)
        if known is None:
            known = classes[alike] = _Alike(saved.shape, placements, kept_to, saved.dtype.itemsize)
        known.tensors.append(saved)
    yield from classes.values()


def _tensors(catalog: Catalog, layout: SpecLayout, request: LoadRequest) -> tuple[PlannedTensor, ...]:
    """What any rank wants: what the first would, if it held all parameters."""
    return wanted_tensors(catalog, replace(layout, held_by=()).rank(0), request)


def _boxes_of_ranks(mesh: Mesh, alike: _Alike) -> np.ndarray:
    """The box of each rank: ``int64[world_size, 2, ndim]``, offsets and sizes. A scalar is one element of one dimension."""
    ranks = ranks_at(mesh, np.arange(mesh.size), alike.kept_to)
    found = MeshBoxes(alike.shape or (1,), mesh, alike.placements, ranks)
    boxes = np.zeros((mesh.size, 2, len(alike.shape or (1,))), dtype=np.int64)
    boxes[ranks, 0], boxes[ranks, 1] = found.offsets, found.sizes
    return boxes


def _bytes_of_files(catalog: Catalog, alike: _Alike, wanted: np.ndarray) -> np.ndarray:
    """Bytes that the wanted boxes, which are disjoint, have of each file: ``float64[num_files]``, whole numbers."""
    of_chunks = _common_numel(np.stack(catalog.boxes(alike.tensors[0]), axis=1), wanted) * alike.itemsize
    files = np.concatenate([catalog.chunk_file[t.chunks.start : t.chunks.stop] for t in alike.tensors])
    nbytes = np.tile(of_chunks, len(alike.tensors))
    stored = files != NO_FILE
    return np.bincount(files[stored], nbytes[stored], minlength=len(catalog.files))


def _common_numel(chunks: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """How many elements of each chunk lie in one of the disjoint wanted boxes: ``int64[num_chunks]``."""
    ends = chunks.sum(axis=1)
    found = np.zeros(len(chunks), dtype=np.int64)
    step = max(1, _PAIRS // max(len(chunks), 1))
    for boxes in (wanted[start : start + step] for start in range(0, len(wanted), step)):
        common = np.ones((len(boxes), len(chunks)), dtype=np.int64)
        for dim in range(chunks.shape[2]):
            starts = np.maximum.outer(boxes[:, 0, dim], chunks[:, 0, dim])
            stops = np.minimum.outer(boxes[:, 0, dim] + boxes[:, 1, dim], ends[:, dim])
            common *= np.maximum(stops - starts, 0)
        found += common.sum(axis=0)
    return found


def _twins(marks: Sequence[np.ndarray], world_size: int) -> np.ndarray:
    """For each rank the lowest one with the same marks."""
    if not marks:
        return np.zeros(world_size, dtype=np.int64)
    _, first, inverse = np.unique(np.stack(marks, axis=1), axis=0, return_index=True, return_inverse=True)
    return first[inverse.reshape(-1)]
