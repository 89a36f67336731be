"""Count the bytes that every rank of a spec needs, for all ranks at once and without a plan of any rank.

A model has a dozen shapes, each with one placement, and thousands of tensors. Tensors with the same shape, saved boxes and
placement form one class. The boxes of a class are computed once, as columns with one row per rank, and counted as often as
the class has tensors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch.distributed.tensor import Placement, Replicate

from shardferry.checkpoint.catalog import NO_FILE, Catalog, SavedTensor
from shardferry.checkpoint.optimizer_state import index_optimizer
from shardferry.config import LoadRequest
from shardferry.layout.mesh import Mesh
from shardferry.layout.rank_layout import RankLayout
from shardferry.layout.spec import MeshBoxes, SpecLayout, ranks_at, spec_of
from shardferry.plan.load_plan import PlannedTensor
from shardferry.plan.planner import ALIGNMENT, plan_load, planned_objects
from shardferry.region import Region, first_overlap, uncovered

_MAX_PAIRS = 1 << 21  # pairs of boxes that are intersected at a time


@dataclass(frozen=True)
class Demand:
    """What the ranks of a spec need of a checkpoint, without the Python objects, which rank 0 reads for all."""

    needed: np.ndarray  # int64[world_size], bytes of each rank's boxes
    arena: np.ndarray  # int64[world_size], bytes
    unique: int  # bytes that at least one rank needs, each counted once
    of_files: np.ndarray  # int64[num_files], the unique bytes by file
    first_equal: np.ndarray  # int64[world_size], the lowest rank with identical boxes
    num_tensors: int  # that at least one rank needs


def demand_of(catalog: Catalog, layout: SpecLayout, request: LoadRequest) -> Demand:
    """Count what all ranks need. Whether each element is saved is not checked.

    Raises:
        PlanError, LayoutError: as `plan_load` does.
    """
    world_size = layout.world_size
    needed, arena = np.zeros(world_size, dtype=np.int64), np.zeros(world_size, dtype=np.int64)
    of_files = np.zeros(len(catalog.files), dtype=np.float64)
    unique, num_tensors = 0, 0
    box_numbers: list[np.ndarray] = []  # per class, int64[world_size]: equal numbers are identical boxes
    for same in _classes(catalog, layout, request):
        boxes = _boxes_of_ranks(layout.mesh, same)
        numel = _numel(boxes)
        boxes[numel == 0] = 0
        distinct, numbers = np.unique(boxes.reshape(world_size, -1), axis=0, return_inverse=True)
        distinct = distinct.reshape(-1, *boxes.shape[1:])
        box_numbers.append(numbers.reshape(-1))
        num_tensors += len(same.tensors)
        nbytes = numel * same.itemsize
        needed += nbytes * len(same.tensors)
        arena += -(-nbytes // ALIGNMENT) * ALIGNMENT * len(same.tensors)
        held = distinct[_numel(distinct) > 0]
        unique += int(_numel(held).sum()) * same.itemsize * len(same.tensors)
        of_files += _bytes_of_files(catalog, same, held)
    return Demand(
        needed=needed,
        arena=arena,
        unique=unique,
        of_files=of_files.astype(np.int64),
        first_equal=_first_equal(box_numbers, world_size),
        num_tensors=num_tensors,
    )


def _numel(boxes: np.ndarray) -> np.ndarray:
    """Elements of each box: ``int64[num_boxes]`` of ``int64[num_boxes, 2, ndim]``."""
    numel: np.ndarray = np.prod(boxes[:, 1], axis=1, dtype=np.int64)
    return numel


@dataclass(frozen=True, slots=True)
class _TensorClass:
    """Tensors with one shape that are saved in the same boxes and needed in the same boxes."""

    shape: tuple[int, ...]
    placements: tuple[Placement, ...]
    held_at: tuple[tuple[int, ...] | None, ...]  # per mesh axis: the coordinates that hold the tensors; None: all
    itemsize: int
    tensors: list[SavedTensor] = field(default_factory=list)


def _classes(catalog: Catalog, layout: SpecLayout, request: LoadRequest) -> Iterator[_TensorClass]:
    classes: dict[tuple[object, ...], _TensorClass] = {}
    for tensor in _tensors(catalog, layout, request):
        saved = catalog.tensors[tensor.key]
        placements = tensor.layout.placements or (Replicate(),) * len(layout.mesh.axes)
        held_at = layout.holder_coordinates(tensor.fqn)
        boxes = (column.tobytes() for column in catalog.boxes(saved))
        key = (saved.shape, placements, held_at, saved.dtype, *boxes)
        known = classes.get(key)
        if known is None:
            known = classes[key] = _TensorClass(saved.shape, placements, held_at, saved.dtype.itemsize)
        known.tensors.append(saved)
    yield from classes.values()


def _tensors(catalog: Catalog, layout: SpecLayout, request: LoadRequest) -> tuple[PlannedTensor, ...]:
    """The tensors that any rank needs: those of rank 0, if it held all parameters."""
    return plan_load(catalog, replace(layout, held_by=()).rank(0), request, with_reads=False).tensors


def _boxes_of_ranks(mesh: Mesh, same: _TensorClass) -> np.ndarray:
    """The box of each rank: ``int64[world_size, 2, ndim]``, offsets and sizes. A scalar is one element of one dimension."""
    ranks = ranks_at(mesh, np.arange(mesh.size), same.held_at)
    found = MeshBoxes(same.shape or (1,), mesh, same.placements, ranks)
    boxes = np.zeros((mesh.size, 2, len(same.shape or (1,))), dtype=np.int64)
    boxes[ranks, 0], boxes[ranks, 1] = found.offsets, found.sizes
    return boxes


def _bytes_of_files(catalog: Catalog, same: _TensorClass, wanted: np.ndarray) -> np.ndarray:
    """Bytes of the wanted boxes, which are disjoint, in each file: ``float64[num_files]``, whole numbers."""
    of_chunks = _common_numel(np.stack(catalog.boxes(same.tensors[0]), axis=1), wanted) * same.itemsize
    files = np.concatenate([catalog.chunk_file[t.chunks.start : t.chunks.stop] for t in same.tensors])
    nbytes = np.tile(of_chunks, len(same.tensors))
    stored = files != NO_FILE
    return np.bincount(files[stored], nbytes[stored], minlength=len(catalog.files))


def _common_numel(chunks: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Elements of each chunk that are in one of the disjoint wanted boxes: ``int64[num_chunks]``."""
    ends = chunks.sum(axis=1)
    found = np.zeros(len(chunks), dtype=np.int64)
    step = max(1, _MAX_PAIRS // max(len(chunks), 1))
    for boxes in (wanted[start : start + step] for start in range(0, len(wanted), step)):
        common = np.ones((len(boxes), len(chunks)), dtype=np.int64)
        for dim in range(chunks.shape[2]):
            starts = np.maximum.outer(boxes[:, 0, dim], chunks[:, 0, dim])
            stops = np.minimum.outer(boxes[:, 0, dim] + boxes[:, 1, dim], ends[:, dim])
            common *= np.maximum(stops - starts, 0)
        found += common.sum(axis=0)
    return found


def _first_equal(box_numbers: Sequence[np.ndarray], world_size: int) -> np.ndarray:
    """For each rank the lowest rank with the same number in every class."""
    if not box_numbers:
        return np.zeros(world_size, dtype=np.int64)
    _, first, inverse = np.unique(np.stack(box_numbers, axis=1), axis=0, return_index=True, return_inverse=True)
    return first[inverse.reshape(-1)]


def unique_bytes(
    catalog: Catalog, layouts: Sequence[RankLayout], request: LoadRequest, values: Mapping[str, Any] | None = None
) -> int:
    """Bytes that at least one rank needs, each counted once, from the ranks' layouts alone.

    Args:
        layouts: by rank.
        values: the saved Python values, by key. What a live optimizer needs depends on the saved param groups.

    Raises:
        PlanError, LayoutError: as `plan_load` does.
    """
    spec = spec_of(layouts[0])
    if spec is not None:
        return demand_of(catalog, spec, request).unique + object_bytes(catalog, request)
    regions: dict[str, set[Region]] = defaultdict(set)
    itemsize: dict[str, int] = {}
    for layout in layouts:
        for tensor in plan_load(catalog, layout, request, values, with_reads=False).tensors:
            itemsize[tensor.key] = tensor.dtype.itemsize
            regions[tensor.key].update(box.region for box in tensor.layout.boxes)
    known: dict[frozenset[Region], int] = {}  # most tensors have the same boxes as some other
    total = object_bytes(catalog, request)
    for key, boxes in regions.items():
        same = frozenset(boxes)
        if same not in known:
            known[same] = union_numel(boxes)
        total += known[same] * itemsize[key]
    return total


def object_bytes(catalog: Catalog, request: LoadRequest) -> int:
    """Bytes of the Python objects, which rank 0 reads for all."""
    return sum(planned_objects(catalog, request, index_optimizer(catalog, request.optimizer_key)).values())


def read_amplification(nbytes: int, unique: int) -> float:
    """Bytes read from storage over the bytes that are needed; 1 where none are needed."""
    return nbytes / unique if unique else 1.0


def union_numel(regions: Iterable[Region]) -> int:
    """Elements in the union of regions of one tensor; an element in several regions counts once."""
    boxes = sorted(set(regions))
    if not boxes:
        return 0
    offsets = np.array([box.offsets for box in boxes], dtype=np.int64).reshape(len(boxes), -1)
    sizes = np.array([box.sizes for box in boxes], dtype=np.int64).reshape(len(boxes), -1)
    if first_overlap(offsets, sizes) is None:
        return sum(box.numel for box in boxes)
    disjoint: list[Region] = []
    for box in boxes:
        disjoint += uncovered(box, disjoint)
    return sum(box.numel for box in disjoint)
