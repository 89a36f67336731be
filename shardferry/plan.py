"""Turn a catalog and one rank's layout into a load plan, and prove that the plan fills every wanted element exactly once.

A plan is pure data: integers and names. Each rank makes its own, alone; no bytes of the checkpoint's data are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np
import torch

from shardferry.catalog import NO_FILE, Catalog, KeyPath, SavedTensor
from shardferry.collector import paused_gc
from shardferry.errors import PlanError
from shardferry.layout import Box, LiveLayout, Mesh, RankLayout, TensorLayout, replicated
from shardferry.optimizer_index import SCALAR_STATE, OptimizerIndex, index_optimizer, parameter_shape
from shardferry.region import Region, first_overlap, uncovered

ALIGNMENT = 256  # bytes; each tensor starts at a multiple, so that GPUs and direct I/O are content


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One state tensor of one parameter, as this rank will hold it."""

    fqn: str
    name: str  # of the state entry: "exp_avg"
    key: str  # in the checkpoint
    dtype: torch.dtype
    layout: TensorLayout
    arena_offset: int  # bytes
    group_path: KeyPath | None = None  # below "param_groups": a hyperparameter that is a tensor, of no FQN

    @property
    def nbytes(self) -> int:
        return self.layout.local_numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class ReadItem:
    """One copy: from where in a saved chunk to where in a local tensor."""

    tensor: int  # row of LoadPlan.tensors
    chunk: int  # row of the catalog
    source: Region  # in the chunk, elements
    chunk_shape: tuple[int, ...]
    offset: int  # elements, from the start of the local tensor
    strides: tuple[int, ...]  # elements of the local tensor, a step in each dimension of `source`


@dataclass(frozen=True, slots=True)
class PlannedObject:
    """One saved Python object that every rank wants: a state entry, or a part of the param groups."""

    key: str
    nbytes: int
    fqn: str | None  # None: of the param groups
    name: str
    path: KeyPath = ()  # below "param_groups"


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """Everything that one rank has to read, and where it goes."""

    world_rank: int
    world_size: int
    mesh: Mesh | None
    optimizer_key: str
    tensors: tuple[PlannedTensor, ...]
    reads: tuple[ReadItem, ...]
    objects: tuple[PlannedObject, ...]
    arena_bytes: int

    @property
    def bytes_needed(self) -> int:
        """Bytes that this rank wants: its boxes of tensors, and whole items of Python objects."""
        tensors = sum(t.layout.wanted_numel * t.dtype.itemsize for t in self.tensors)
        return tensors + sum(o.nbytes for o in self.objects)


@paused_gc()
def plan_load(catalog: Catalog, layout: RankLayout, *, optimizer_key: str) -> LoadPlan:
    """Plan one rank's load of one optimizer.

    Raises:
        PlanError: nothing is saved under the key, a wanted parameter isn't there, an element is in no saved chunk
            (a hole) or in two (an overlap); the message names FQN and box.
        LayoutError: a parameter can't lie as the layout says.
    """
    index = index_optimizer(catalog, optimizer_key)
    planner = _Planner(catalog)
    for fqn in _wanted_fqns(catalog, index, layout):
        entries = index.state.get(fqn, {})
        tensors = {name: catalog.tensors[key] for name, key in entries.items() if key in catalog.tensors}
        shape = parameter_shape(tensors)
        for name, key in entries.items():
            if key in catalog.objects:
                planner.add_object(key, fqn, name)
            else:
                saved = tensors[name]
                planner.add_tensor(fqn, name, saved, _layout_of(layout, fqn, name, saved, shape))
    for path, key in index.param_groups.items():
        planner.add_group_entry(path, key)
    return planner.finish(layout, optimizer_key)


def plan_tensors(
    catalog: Catalog, wanted: Sequence[tuple[str, TensorLayout]], *, world_rank: int, world_size: int
) -> LoadPlan:
    """Plan the load of some tensors of one rank, each by its key and where it lies; no optimizer is looked for.

    Raises:
        PlanError: a hole or an overlap.
    """
    planner = _Planner(catalog)
    for key, layout in wanted:
        planner.add_tensor("", key, catalog.tensors[key], layout)
    return planner.finish(LiveLayout(world_rank, world_size, {}), "")


def _layout_of(
    layout: RankLayout, fqn: str, name: str, saved: SavedTensor, shape: tuple[int, ...] | None
) -> TensorLayout:
    """State with its parameter's shape lies as the parameter does; all other state is replicated, never cut by guess."""
    if name in SCALAR_STATE or saved.shape != shape:
        return replicated(saved.shape)
    return layout.parameter(fqn, saved.shape)


def _wanted_fqns(catalog: Catalog, index: OptimizerIndex, layout: RankLayout) -> Sequence[str]:
    wanted = layout.fqns()
    if wanted is None:
        return list(index.state)
    if not index.state:  # an optimizer without state: SGD without momentum
        return []
    missing = [fqn for fqn in wanted if fqn not in index.state]
    if missing:
        near = get_close_matches(missing[0], index.state, n=3, cutoff=0.0)
        raise PlanError(
            f"{missing[0]}: the checkpoint {catalog.location} has no state for this parameter under "
            f"{index.optimizer_key!r} ({len(missing)} of {len(wanted)} wanted parameters are missing, "
            f"{len(index.state)} are saved); the nearest saved names are {', '.join(near)}"
        )
    return wanted


@dataclass(frozen=True, slots=True)
class _Cut:
    """A read item of any tensor that is saved and wanted in the same boxes."""

    chunk: int  # counted from the tensor's first
    source: Region
    chunk_shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]


class _Planner:
    """Collects the tensors and reads of one rank, and gives each tensor its place in the arena."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._known_cuts: dict[tuple[object, ...], list[_Cut]] = {}  # most tensors of a model look like some other
        self._tensors: list[PlannedTensor] = []
        self._reads: list[ReadItem] = []
        self._objects: list[PlannedObject] = []
        self._end = 0

    def add_object(self, key: str, fqn: str, name: str) -> None:
        self._objects.append(PlannedObject(key, self._catalog.objects[key].byte_length, fqn, name))

    def add_group_entry(self, path: KeyPath, key: str) -> None:
        if key not in self._catalog.objects:
            # A hyperparameter that is a tensor (lr=torch.tensor(...)): wanted whole by every rank.
            saved = self._catalog.tensors[key]
            self.add_tensor("", ".".join(map(str, path)), saved, replicated(saved.shape), group_path=path)
            return
        item = self._catalog.objects[key]
        self._objects.append(PlannedObject(key, item.byte_length, None, ".".join(map(str, path)), path))

    def add_tensor(
        self, fqn: str, name: str, saved: SavedTensor, layout: TensorLayout, *, group_path: KeyPath | None = None
    ) -> None:
        row = len(self._tensors)
        tensor = PlannedTensor(fqn, name, saved.key, saved.dtype, layout, self._end, group_path)
        self._tensors.append(tensor)
        self._end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        for cut in self._cuts(saved, layout):
            chunk = saved.chunks[cut.chunk]
            self._reads.append(ReadItem(row, chunk, cut.source, cut.chunk_shape, cut.offset, cut.strides))

    def _cuts(self, saved: SavedTensor, layout: TensorLayout) -> list[_Cut]:
        stored = self._catalog.chunk_file[saved.chunks.start : saved.chunks.stop] != NO_FILE
        alike = (layout, *(column.tobytes() for column in (*self._catalog.boxes(saved), stored)))
        cuts = self._known_cuts.get(alike)
        if cuts is None:
            cuts = [cut for box in layout.boxes for cut in self._cuts_of(saved, layout, box)]
            self._known_cuts[alike] = cuts
        return cuts

    def _cuts_of(self, saved: SavedTensor, layout: TensorLayout, box: Box) -> Iterator[_Cut]:
        offset, strides = layout.destination(box)
        for chunk, chunk_region, common in covering_chunks(self._catalog, saved, box.region):
            inside = common.relative_to(box.region.offsets)
            start = offset + sum(o * s for o, s in zip(inside.offsets, strides, strict=True))
            source = common.relative_to(chunk_region.offsets)
            yield _Cut(chunk - saved.chunks.start, source, chunk_region.sizes, start, strides)

    def finish(self, layout: RankLayout, optimizer_key: str) -> LoadPlan:
        return LoadPlan(
            layout.world_rank,
            layout.world_size,
            layout.mesh,
            optimizer_key,
            tuple(self._tensors),
            tuple(self._reads),
            tuple(self._objects),
            self._end,
        )


def covering_chunks(catalog: Catalog, saved: SavedTensor, wanted: Region) -> list[tuple[int, Region, Region]]:
    """The saved chunks that hold a region, proven to hold each of its elements exactly once.

    Returns:
        For each chunk: its row in the catalog, its box, and what it has in common with ``wanted``.

    Raises:
        PlanError: an element is in no saved chunk, or in two that are stored at different places.
    """
    offsets, sizes = catalog.boxes(saved)
    starts = np.maximum(offsets, wanted.offsets)
    lengths = np.minimum(offsets + sizes, wanted.ends) - starts
    stored = catalog.chunk_file[saved.chunks.start : saved.chunks.stop] != NO_FILE
    rows = np.flatnonzero((lengths > 0).all(axis=1) & stored)
    covered = int(np.prod(lengths[rows], axis=1, dtype=np.int64).sum())
    overlap = first_overlap(starts[rows], lengths[rows])
    if overlap is not None:
        raise _overlap_error(catalog, saved, rows[list(overlap)].tolist())
    if covered != wanted.numel:
        raise _hole_error(catalog, saved, wanted, [_region(offsets, sizes, row) for row in rows.tolist()])
    return [(saved.chunks[row], _region(offsets, sizes, row), _region(starts, lengths, row)) for row in rows.tolist()]


def _region(offsets: np.ndarray, sizes: np.ndarray, row: int) -> Region:
    return Region(tuple(offsets[row].tolist()), tuple(sizes[row].tolist()))


def _overlap_error(catalog: Catalog, saved: SavedTensor, rows: list[int]) -> PlanError:
    chunks = [saved.chunks[row] for row in rows]
    (one, other) = [catalog.region(saved, chunk) for chunk in chunks]
    files = [catalog.files[catalog.chunk_file[chunk]] for chunk in chunks]
    return PlanError(
        f"{saved.key}: {one.intersect(other)} is saved twice, in {files[0]} as part of {one} and in {files[1]} as part of "
        f"{other}; which one is right can't be known. Save again with a writer that removes duplicates."
    )


def _hole_error(catalog: Catalog, saved: SavedTensor, wanted: Region, chunks: list[Region]) -> PlanError:
    holes = uncovered(wanted, chunks)
    missing = sum(hole.numel for hole in holes)
    return PlanError(
        f"{saved.key}: {missing} of {wanted.numel} wanted elements are in no saved chunk, first at {holes[0]} of the shape "
        f"{saved.shape}; the checkpoint {catalog.location} is incomplete. Use another checkpoint or save again."
    )


def find_problems(catalog: Catalog) -> list[str]:
    """What is wrong with a checkpoint as its metadata describes it: each hole, overlap and unstored chunk, in words."""
    problems = list(catalog.problems)
    for saved in catalog.tensors.values():
        whole = Region.whole(saved.shape)
        if not whole.numel:
            continue
        try:
            covering_chunks(catalog, saved, whole)
        except PlanError as error:
            problems.append(str(error))
    return problems
