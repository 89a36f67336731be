"""Turn a catalog and one rank's layout into a load plan, and prove that the plan fills every wanted element exactly once.

A plan is pure data: integers and names. Each rank makes its own, alone; no bytes of the checkpoint's data are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from shardferry._gc import paused_gc
from shardferry.checkpoint.catalog import NO_FILE, Catalog, SavedTensor
from shardferry.checkpoint.optimizer_state import (
    SCALAR_STATE,
    OptimizerIndex,
    SavedOptimizer,
    index_optimizer,
    index_weights,
    top_level_keys,
)
from shardferry.config import DtypePolicy, LoadRequest, can_convert
from shardferry.errors import LayoutError, PlanError
from shardferry.layout.live import LiveLayout
from shardferry.layout.mesh import sharded_dim
from shardferry.layout.rank_layout import RankLayout
from shardferry.layout.spec import SpecLayout, spec_of
from shardferry.layout.tensor_layout import LocalRegion, TensorLayout
from shardferry.plan.cover import covering_chunks
from shardferry.plan.load_plan import (
    LoadPlan,
    MatchedKeys,
    PlannedObject,
    PlannedTensor,
    PlannedValue,
    ReadItem,
    Section,
)
from shardferry.plan.match_keys import (
    MatchedParam,
    check_globs,
    check_spec,
    find_state,
    find_weights,
    matched_keys,
    mismatch_error,
)
from shardferry.plan.state_layout import StateLayouts
from shardferry.region import BoxCopy
from shardferry.state_dicts import KeyPath, LeftLive

ALIGNMENT = 256  # bytes; each tensor starts at a multiple, so that GPUs and direct I/O are content


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
    return _plan(_Planner(catalog, layout, request, values), catalog, layout, request, values)


def wanted_tensors(
    catalog: Catalog, layout: RankLayout, request: LoadRequest, values: Mapping[str, Any] | None = None
) -> tuple[PlannedTensor, ...]:
    """What one rank wants, as in its plan, without where it comes from. Raises as `plan_load` does, but for holes and overlaps."""
    planner = _Planner(catalog, layout, request, values, with_reads=False)
    return _plan(planner, catalog, layout, request, values).tensors


@paused_gc()
def _plan(
    planner: _Planner, catalog: Catalog, layout: RankLayout, request: LoadRequest, values: Mapping[str, Any] | None
) -> LoadPlan:
    index = index_optimizer(catalog, request.optimizer_key)
    saved = SavedOptimizer.resolve(index, values, request, layout.positions())
    spec = spec_of(layout)
    if spec is not None or not request.selection.is_everything:
        names = saved.names | _names_beside(catalog, request, index)
        check_globs(request.selection, names)
        if spec is not None:
            state = None if request.optimizer_key is None else {**saved.unselected, **saved.state}
            check_spec(spec, set(map(request.selection.wanted_name, names)), state)
    found, missing = find_state(saved, layout, request)
    planner.add_state(saved, found, index)
    weight_keys = MatchedKeys()
    if request.model_key is not None:
        weights = saved_weights(catalog, request, index)
        found_weights, missing_weights = find_weights(weights, layout, request, catalog.location)
        planner.add_weights(weights, found_weights)
        missing += missing_weights
        weight_keys = matched_keys(weights, found_weights, layout)
    if layout.world_rank == 0:
        planner.add_objects(planned_objects(catalog, request))
    plan = planner.finish(
        fqns=tuple(parameter.fqn for parameter in found),
        missing=missing,
        param_groups=saved.groups_of({parameter.saved for parameter in found}),
        state_keys=matched_keys(saved.state, found, layout),
        weight_keys=weight_keys,
    )
    if spec is not None:
        _check_default(spec, catalog, plan)
    return plan


def _check_default(spec: SpecLayout, catalog: Catalog, plan: LoadPlan) -> None:
    """Refuse a default for a dimension that no saved tensor has, as it would replicate everything.

    It is not refused where no matrix is laid out as its parameter: other state doesn't tell the parameters' dimensions.

    Raises:
        LayoutError: names the first matrix.
    """
    followers = (tensor for tensor in plan.tensors if tensor.sharded_like_param)
    first = next((tensor for tensor in followers if len(tensor.layout.global_shape) > 1), None)
    if first is None:
        return
    most = max(len(saved.shape) for saved in catalog.tensors.values())
    for axis, placement in (spec.default or {}).items():
        dim = sharded_dim(placement)
        if dim is not None and dim >= most:
            shape = first.layout.global_shape
            raise LayoutError(
                f"{first.fqn}: Shard({dim}) asks for dimension {dim} of a tensor with {len(shape)} dimensions {shape}, and no "
                f"saved tensor has it (default: {axis}); shard one of 0 to {most - 1}"
            )


def _names_beside(catalog: Catalog, request: LoadRequest, index: OptimizerIndex) -> set[str]:
    """The names of all other tensors below the model's key or their top-level key: parameters that never stepped, buffers."""
    of_optimizer = set(index.all_keys())
    paths = (catalog.path(key) for key in catalog.tensors if key not in of_optimizer)
    weights = () if request.model_key is None else _weights(catalog, request, index)
    return {*weights, *(".".join(map(str, path[1:] or path)) for path in paths)}


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
            f"{catalog.location}: under model_key {request.model_key!r} there is nothing but the optimizer's own state; "
            f"top-level keys are {', '.join(map(repr, top_level_keys(catalog)))}"
        )
    return weights


def value_keys(catalog: Catalog, request: LoadRequest) -> list[str]:
    """Keys that are read whole, once per job: the request's Python objects, and hyperparameters that are tensors."""
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
    """Plan one rank's load of single tensors, each by its key and its layout; no optimizer is looked up.

    Raises:
        PlanError: a hole or an overlap.
    """
    planner = _Planner(catalog, LiveLayout(world_rank, world_size, {}), LoadRequest())
    for key, layout in wanted:
        planner.add_tensor(catalog.tensors[key], layout)
    return planner.finish()


_ChunkCopy = tuple[int, tuple[int, ...], BoxCopy]  # chunk, counted from the tensor's first; its shape; the copy


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

    def __init__(
        self,
        catalog: Catalog,
        layout: RankLayout,
        request: LoadRequest,
        saved_values: Mapping[str, Any] | None = None,
        *,
        with_reads: bool = True,
    ) -> None:
        self._catalog = catalog
        self._layout = layout
        self._request = request
        self._saved_values = saved_values
        self._with_reads = with_reads
        self._all_stored = not (catalog.chunk_file == NO_FILE).any()
        self._layouts = _Interned()
        self._known_copies: dict[
            tuple[object, ...], list[_ChunkCopy]
        ] = {}  # most tensors of a model look like some other
        self._tensors: list[PlannedTensor] = []
        self._reads: list[ReadItem] = []
        self._objects: list[PlannedObject] = []
        self._values: list[PlannedValue] = []
        self._mismatched: list[LayoutError] = []
        self._end = 0

    def add_state(self, saved: SavedOptimizer, found: Sequence[MatchedParam], index: OptimizerIndex) -> None:
        """The state of the wanted parameters that are saved."""
        layouts = StateLayouts(self._catalog, saved, found, layout=self._layout, request=self._request, index=index)
        for parameter in found:
            for name, entry in saved.state.get(parameter.saved, {}).items():
                tensor = self._catalog.tensors.get(entry.key)
                if tensor is None:
                    self._add_value(entry.key, parameter.fqn, entry.path, "state")
                    continue
                try:
                    layout, follows = layouts.layout_for(parameter.fqn, name, tensor)
                    cast = self._cast(parameter.fqn, name, tensor)
                except LayoutError as error:
                    self._mismatched.append(error)
                else:
                    self.add_tensor(
                        tensor, layout, fqn=parameter.fqn, path=entry.path, cast=cast, sharded_like_param=follows
                    )

    def add_weights(self, weights: Mapping[str, str], found: Sequence[MatchedParam]) -> None:
        """The wanted weights and buffers that are saved."""
        for wanted in found:
            key = weights[wanted.saved]
            tensor = self._catalog.tensors.get(key)
            if tensor is None:
                self._add_value(key, wanted.fqn, (), "model")
                continue
            try:
                layout = self._layout.weight(wanted.fqn, tensor.shape)
                cast = self._cast(wanted.fqn, "", tensor)
            except LayoutError as error:
                self._mismatched.append(error)
            else:
                self.add_tensor(tensor, layout, fqn=wanted.fqn, section="model", cast=cast)

    def _add_value(self, key: str, fqn: str, path: KeyPath, section: Section) -> None:
        value = None if self._saved_values is None else self._saved_values[key]
        if isinstance(value, LeftLive):
            return
        self._values.append(PlannedValue(key, fqn, path, value, section))

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
        saved: SavedTensor,
        layout: TensorLayout,
        *,
        fqn: str = "",
        path: KeyPath = (),
        section: Section = "state",
        cast: torch.dtype | None = None,
        sharded_like_param: bool = True,
    ) -> None:
        row, layout = len(self._tensors), self._layouts.one_of(layout)
        tensor = PlannedTensor(
            key=saved.key,
            fqn=fqn,
            path=path,
            dtype=saved.dtype,
            layout=layout,
            arena_offset=self._end,
            section=section,
            cast=cast,
            sharded_like_param=sharded_like_param,
        )
        self._tensors.append(tensor)
        self._end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        if self._with_reads:
            first = saved.chunks.start
            self._reads += [
                ReadItem(row, first + chunk, chunk_shape, copy)
                for chunk, chunk_shape, copy in self._copies(saved, layout)
            ]

    def _copies(self, saved: SavedTensor, layout: TensorLayout) -> list[_ChunkCopy]:
        same = (id(layout), *(column.tobytes() for column in self._catalog.boxes(saved)), self._stored(saved))
        copies = self._known_copies.get(same)
        if copies is None:
            copies = [copy for box in layout.boxes for copy in self._copies_of(saved, layout, box)]
            self._known_copies[same] = copies
        return copies

    def _stored(self, saved: SavedTensor) -> bytes:
        """Which of a tensor's chunks are in a file; empty where every chunk of the checkpoint is."""
        if self._all_stored:
            return b""
        stored: np.ndarray = self._catalog.chunk_file[saved.chunks.start : saved.chunks.stop] != NO_FILE
        return stored.tobytes()

    def _copies_of(self, saved: SavedTensor, layout: TensorLayout, box: LocalRegion) -> Iterator[_ChunkCopy]:
        offset, strides = layout.destination(box)
        for chunk, chunk_region, common in covering_chunks(self._catalog, saved, box.region):
            inside = common.relative_to(box.region.offsets)
            start = offset + sum(o * s for o, s in zip(inside.offsets, strides, strict=True))
            copy = BoxCopy(common.relative_to(chunk_region.offsets), start, strides)
            yield chunk - saved.chunks.start, chunk_region.sizes, copy

    def finish(self, **known: Any) -> LoadPlan:
        """The plan. Raises LayoutError where something didn't fit."""
        if self._mismatched:
            raise mismatch_error(self._mismatched)
        return LoadPlan(
            world_rank=self._layout.world_rank,
            world_size=self._layout.world_size,
            mesh=self._layout.mesh,
            request=self._request,
            tensors=tuple(self._tensors),
            reads=tuple(self._reads),
            objects=tuple(self._objects),
            values=tuple(self._values),
            arena_bytes=self._end,
            **known,
        )
