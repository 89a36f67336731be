"""Turn a catalog and one rank's layout into a load plan, and prove that the plan fills every wanted element exactly once.

A plan is pure data: integers and names. Each rank makes its own, alone; no bytes of the checkpoint's data are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from shardferry._gc import paused_gc
from shardferry.checkpoint.catalog import NO_FILE, Catalog, SavedTensor
from shardferry.checkpoint.optimizer_state import (
    SCALAR_STATE,
    OptimizerIndex,
    ParamGroup,
    SavedOptimizer,
    index_optimizer,
    index_weights,
    top_level_keys,
)
from shardferry.config import DtypePolicy, LoadRequest, can_convert
from shardferry.errors import LayoutError, PlanError
from shardferry.layout.live import LiveLayout
from shardferry.layout.mesh import Mesh
from shardferry.layout.tensor_layout import Box, RankLayout, TensorLayout
from shardferry.plan.manifest import Section
from shardferry.plan.match_keys import Claims, Found, check_globs, find_state, find_weights, mismatch_error
from shardferry.plan.state_layout import StateShapes
from shardferry.region import Region, first_overlap, tile, uncovered
from shardferry.state_dicts import KeyPath

ALIGNMENT = 256  # bytes; each tensor starts at a multiple, so that GPUs and direct I/O are content


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor as this rank will hold it: an entry of a parameter's state, or the parameter or buffer itself."""

    fqn: str
    name: str  # of the state entry: "exp_avg"; empty for weights
    key: str  # in the checkpoint
    dtype: torch.dtype  # as saved, and in the arena
    layout: TensorLayout
    arena_offset: int  # bytes
    section: Section = "state"
    path: KeyPath = ()  # below the parameter: ("exp_avg",)
    cast: torch.dtype | None = None  # what the trainer wants instead of `dtype`
    as_parameter: bool = True  # it lies as its parameter does

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
    """One saved value that is read whole, by rank 0, which tells the others: a hyperparameter, a ``step`` that is a number."""

    key: str
    nbytes: int  # of its item


@dataclass(frozen=True, slots=True)
class PlannedValue:
    """Where a saved Python value goes on this rank."""

    fqn: str
    path: KeyPath  # below the parameter
    key: str
    section: Section = "state"


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """Everything that one rank has to read, and where it goes."""

    world_rank: int
    world_size: int
    mesh: Mesh | None
    request: LoadRequest
    tensors: tuple[PlannedTensor, ...]
    reads: tuple[ReadItem, ...]
    objects: tuple[PlannedObject, ...]  # that this rank reads for all
    values: tuple[PlannedValue, ...]
    arena_bytes: int
    fqns: tuple[str, ...] = ()  # parameters that this load is for, with or without state
    missing: tuple[str, ...] = ()  # wanted, not saved, allowed
    param_groups: tuple[ParamGroup, ...] | None = None  # None: they were not read
    state_claims: Claims = field(default_factory=Claims)
    weight_claims: Claims = field(default_factory=Claims)

    @property
    def bytes_needed(self) -> int:
        """Bytes that this rank wants: its boxes of tensors, and whole items of Python objects."""
        tensors = sum(t.layout.wanted_numel * t.dtype.itemsize for t in self.tensors)
        return tensors + sum(o.nbytes for o in self.objects)


def plan_load(
    catalog: Catalog, layout: RankLayout, request: LoadRequest, values: Mapping[str, Any] | None = None
) -> LoadPlan:
    """Plan one rank's load of one optimizer, and of the weights where they are asked for.

    Args:
        values: the saved Python values by key, see `value_keys`; None in a dry run, which then can't tell a parameter that never
            stepped from one that was not saved.

    Raises:
        PlanError: nothing is saved under the key, a wanted parameter isn't there, an element is in no saved chunk
            (a hole) or in two (an overlap); the message names FQN and box.
        LayoutError: a parameter can't lie as the layout says, or has another dtype than is wanted.
    """
    return _plan(_Planner(catalog, layout, request), catalog, layout, request, values)


def wanted_tensors(
    catalog: Catalog, layout: RankLayout, request: LoadRequest, values: Mapping[str, Any] | None = None
) -> tuple[PlannedTensor, ...]:
    """What one rank wants, as in its plan, without where it comes from. Raises as `plan_load` does, but for holes and overlaps."""
    return _plan(_Planner(catalog, layout, request, with_reads=False), catalog, layout, request, values).tensors


@paused_gc()
def _plan(
    planner: _Planner, catalog: Catalog, layout: RankLayout, request: LoadRequest, values: Mapping[str, Any] | None
) -> LoadPlan:
    index = index_optimizer(catalog, request.optimizer_key)
    saved = SavedOptimizer.resolve(index, values, request, layout.positions())
    if not request.selection.is_everything:
        check_globs(request.selection, saved.names | _names_beside(catalog, index))
    found, missing = find_state(saved, layout, request)
    planner.add_state(saved, found, index)
    weight_claims = Claims()
    if request.model_key is not None:
        weights = saved_weights(catalog, request, index)
        found_weights, missing_weights = find_weights(weights, layout, request, catalog.location)
        planner.add_weights(weights, found_weights)
        missing += missing_weights
        weight_claims = Claims.of(weights, found_weights, layout)
    if layout.world_rank == 0:
        planner.add_objects(planned_objects(catalog, request))
    return planner.finish(
        fqns=tuple(parameter.fqn for parameter in found),
        missing=missing,
        param_groups=saved.groups_of({parameter.saved for parameter in found}),
        state_claims=Claims.of(saved.state, found, layout),
        weight_claims=weight_claims,
    )


def _names_beside(catalog: Catalog, index: OptimizerIndex) -> set[str]:
    """What all else is called below its top-level key: weights of parameters that never stepped, buffers."""
    of_optimizer = set(index.all_keys())
    paths = (catalog.path(key) for key in catalog.tensors if key not in of_optimizer)
    return {".".join(map(str, path[1:] or path)) for path in paths}


def saved_weights(catalog: Catalog, request: LoadRequest, index: OptimizerIndex) -> dict[str, str]:
    """The keys of the saved weights by the FQNs that are used here. Raises PlanError."""
    named: dict[str, str] = {}
    for saved, key in _weights(catalog, request, index).items():
        fqn = request.selection.wanted_name(saved)
        if fqn in named:
            raise PlanError(f"{fqn}: two saved weights get this name, {saved!r} is one; narrow the renaming")
        if request.selection.selects(fqn):
            named[fqn] = key
    return named


def _weights(catalog: Catalog, request: LoadRequest, index: OptimizerIndex) -> dict[str, str]:
    """The keys of the saved weights by the FQNs that were saved; the optimizer may lie beside or among them."""
    assert request.model_key is not None
    of_optimizer = set(index.all_keys())
    found = index_weights(catalog, request.model_key)
    weights = {fqn: key for fqn, key in found.items() if key not in of_optimizer}
    if not weights:
        raise PlanError(
            f"{catalog.location}: under model_key {request.model_key!r} lies nothing but the optimizer's own state; "
            f"top-level keys are {', '.join(map(repr, top_level_keys(catalog)))}"
        )
    return weights


def value_keys(catalog: Catalog, request: LoadRequest) -> list[str]:
    """Keys of what is read whole, once a job: every Python object of the request, and hyperparameters that are tensors."""
    index = index_optimizer(catalog, request.optimizer_key)
    weights = [] if request.model_key is None else list(_weights(catalog, request, index).values())
    objects = [key for key in (*index.all_keys(), *weights) if key in catalog.objects]
    return objects + [key for key in index.param_groups.values() if key in catalog.tensors]


def planned_objects(catalog: Catalog, request: LoadRequest) -> list[PlannedObject]:
    """What is read whole, once a job."""
    return [PlannedObject(key, _item_bytes(catalog, key)) for key in value_keys(catalog, request)]


def _item_bytes(catalog: Catalog, key: str) -> int:
    item = catalog.objects.get(key)
    return item.byte_length if item is not None else catalog.tensors[key].nbytes


def plan_tensors(
    catalog: Catalog, wanted: Sequence[tuple[str, TensorLayout]], *, world_rank: int, world_size: int
) -> LoadPlan:
    """Plan the load of some tensors of one rank, each by its key and where it lies; no optimizer is looked for.

    Raises:
        PlanError: a hole or an overlap.
    """
    planner = _Planner(catalog, LiveLayout(world_rank, world_size, {}), LoadRequest())
    for key, layout in wanted:
        planner.add_tensor("", key, catalog.tensors[key], layout)
    return planner.finish()


@dataclass(frozen=True, slots=True)
class _Cut:
    """A read item of any tensor that is saved and wanted in the same boxes."""

    chunk: int  # counted from the tensor's first
    source: Region
    chunk_shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]


class _Interned:
    """Keeps one of equal layouts: they are compared and sent to other ranks more often than they are made."""

    def __init__(self) -> None:
        self._by_value: dict[TensorLayout, TensorLayout] = {}
        self._by_id: dict[int, tuple[TensorLayout, TensorLayout]] = {}  # the first one keeps the id from being reused

    def one_of(self, layout: TensorLayout) -> TensorLayout:
        """The layout that stands for all that are equal to this one."""
        known = self._by_id.get(id(layout))
        if known is None:
            known = self._by_id[id(layout)] = (layout, self._by_value.setdefault(layout, layout))
        return known[1]


class _Planner:
    """Collects the tensors and reads of one rank, and gives each tensor its place in the arena."""

    def __init__(self, catalog: Catalog, layout: RankLayout, request: LoadRequest, *, with_reads: bool = True) -> None:
        self._catalog = catalog
        self._layout = layout
        self._request = request
        self._with_reads = with_reads
        self._all_stored = not (catalog.chunk_file == NO_FILE).any()
        self._layouts = _Interned()
        self._known_cuts: dict[tuple[object, ...], list[_Cut]] = {}  # most tensors of a model look like some other
        self._tensors: list[PlannedTensor] = []
        self._reads: list[ReadItem] = []
        self._objects: list[PlannedObject] = []
        self._values: list[PlannedValue] = []
        self._mismatched: list[LayoutError] = []
        self._end = 0

    def add_state(self, saved: SavedOptimizer, found: Sequence[Found], index: OptimizerIndex) -> None:
        """The state of the wanted parameters that are saved."""
        shapes = StateShapes(self._catalog, saved, found, self._layout, self._request, index)
        for parameter in found:
            for name, entry in saved.state.get(parameter.saved, {}).items():
                tensor = self._catalog.tensors.get(entry.key)
                if tensor is None:
                    self._values.append(PlannedValue(parameter.fqn, entry.path, entry.key))
                    continue
                try:
                    layout, follows = shapes.lies(parameter.fqn, name, tensor)
                    cast = self._cast(parameter.fqn, name, tensor)
                except LayoutError as error:
                    self._mismatched.append(error)
                else:
                    self.add_tensor(
                        parameter.fqn, name, tensor, layout, path=entry.path, cast=cast, as_parameter=follows
                    )

    def add_weights(self, weights: Mapping[str, str], found: Sequence[Found]) -> None:
        """The wanted weights and buffers that are saved."""
        for wanted in found:
            key = weights[wanted.saved]
            tensor = self._catalog.tensors.get(key)
            if tensor is None:
                self._values.append(PlannedValue(wanted.fqn, (), key, "model"))
                continue
            try:
                layout = self._layout.weight(wanted.fqn, tensor.shape)
                cast = self._cast(wanted.fqn, "", tensor)
            except LayoutError as error:
                self._mismatched.append(error)
            else:
                self.add_tensor(wanted.fqn, "", tensor, layout, section="model", cast=cast)

    def _cast(self, fqn: str, name: str, saved: SavedTensor) -> torch.dtype | None:
        """The dtype to convert to. Raises LayoutError where that must be asked for, and wasn't."""
        wanted = self._layout.dtype(fqn, name) or self._request.wanted_dtype(name)
        if wanted is None or wanted == saved.dtype or name in SCALAR_STATE:
            return None
        convertible = can_convert(saved.dtype, wanted)
        if convertible and self._request.dtype is DtypePolicy.CAST:
            return wanted
        what = f"{name!r}" if name else "the weight"
        way_out = "to convert it set dtype: cast" if convertible else "a cast between these would lose the numbers"
        raise LayoutError(f"{fqn}: {what} was saved as {saved.dtype} and is wanted as {wanted}; {way_out}")

    def add_objects(self, objects: Sequence[PlannedObject]) -> None:
        """What this rank reads whole, for all."""
        self._objects += objects

    def add_tensor(
        self,
        fqn: str,
        name: str,
        saved: SavedTensor,
        layout: TensorLayout,
        *,
        section: Section = "state",
        path: KeyPath = (),
        cast: torch.dtype | None = None,
        as_parameter: bool = True,
    ) -> None:
        row, layout = len(self._tensors), self._layouts.one_of(layout)
        tensor = PlannedTensor(fqn, name, saved.key, saved.dtype, layout, self._end, section, path, cast, as_parameter)
        self._tensors.append(tensor)
        self._end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        for cut in self._cuts(saved, layout) if self._with_reads else ():
            chunk = saved.chunks[cut.chunk]
            self._reads.append(ReadItem(row, chunk, cut.source, cut.chunk_shape, cut.offset, cut.strides))

    def _cuts(self, saved: SavedTensor, layout: TensorLayout) -> list[_Cut]:
        alike = (id(layout), *(column.tobytes() for column in self._catalog.boxes(saved)), self._stored(saved))
        cuts = self._known_cuts.get(alike)
        if cuts is None:
            cuts = [cut for box in layout.boxes for cut in self._cuts_of(saved, layout, box)]
            self._known_cuts[alike] = cuts
        return cuts

    def _stored(self, saved: SavedTensor) -> bytes:
        """Which of a tensor's chunks are in a file; empty where every chunk of the checkpoint is."""
        if self._all_stored:
            return b""
        stored: np.ndarray = self._catalog.chunk_file[saved.chunks.start : saved.chunks.stop] != NO_FILE
        return stored.tobytes()

    def _cuts_of(self, saved: SavedTensor, layout: TensorLayout, box: Box) -> Iterator[_Cut]:
        offset, strides = layout.destination(box)
        for chunk, chunk_region, common in covering_chunks(self._catalog, saved, box.region):
            inside = common.relative_to(box.region.offsets)
            start = offset + sum(o * s for o, s in zip(inside.offsets, strides, strict=True))
            source = common.relative_to(chunk_region.offsets)
            yield _Cut(chunk - saved.chunks.start, source, chunk_region.sizes, start, strides)

    def finish(self, **known: Any) -> LoadPlan:
        """The plan. Raises LayoutError where something didn't fit."""
        if self._mismatched:
            raise mismatch_error(self._mismatched)
        return LoadPlan(
            self._layout.world_rank,
            self._layout.world_size,
            self._layout.mesh,
            self._request,
            tuple(self._tensors),
            tuple(self._reads),
            tuple(self._objects),
            tuple(self._values),
            self._end,
            **known,
        )


def covering_chunks(catalog: Catalog, saved: SavedTensor, wanted: Region) -> list[tuple[int, Region, Region]]:
    """The saved chunks that hold a region, proven to hold each of its elements exactly once.

    Returns:
        For each chunk: its row in the catalog, its box, and what it has in common with ``wanted``.

    Raises:
        PlanError: an element is in no saved chunk, or in two that are stored at different places.
    """
    offsets, sizes = catalog.boxes(saved)
    rows, starts, lengths = _covering_rows(catalog, saved, wanted)
    common = zip(rows.tolist(), starts.tolist(), lengths.tolist(), strict=True)
    return [
        (saved.chunks[row], _region(offsets, sizes, row), Region(tuple(start), tuple(length)))
        for row, start, length in common
    ]


def _covering_rows(catalog: Catalog, saved: SavedTensor, wanted: Region) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same as columns: rows of the tensor's chunks, and offsets and sizes of what they have in common with ``wanted``."""
    offsets, sizes = catalog.boxes(saved)
    starts = np.maximum(offsets, wanted.offsets)
    lengths = np.minimum(offsets + sizes, wanted.ends) - starts
    stored = catalog.chunk_file[saved.chunks.start : saved.chunks.stop] != NO_FILE
    rows = np.flatnonzero((lengths > 0).all(axis=1) & stored)
    starts, lengths = starts[rows], lengths[rows]
    if not tile(starts, lengths, wanted):
        overlap = first_overlap(starts, lengths)
        if overlap is not None:
            raise _overlap_error(catalog, saved, rows[list(overlap)].tolist())
        raise _hole_error(catalog, saved, wanted, [_region(offsets, sizes, row) for row in rows.tolist()])
    return rows, starts, lengths


def check_cover(catalog: Catalog, tensors: Iterable[SavedTensor]) -> None:
    """Prove that each element of some tensors is saved exactly once. Tensors that are cut alike are looked at once.

    Raises:
        PlanError: a hole or an overlap.
    """
    proven: set[tuple[object, ...]] = set()
    for saved in tensors:
        stored = catalog.chunk_file[saved.chunks.start : saved.chunks.stop] != NO_FILE
        alike = (saved.shape, *(column.tobytes() for column in (*catalog.boxes(saved), stored)))
        if alike not in proven:
            _covering_rows(catalog, saved, Region.whole(saved.shape))
            proven.add(alike)


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
            _covering_rows(catalog, saved, whole)
        except PlanError as error:
            problems.append(str(error))
    return problems
