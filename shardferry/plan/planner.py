"""Turn a catalog and one rank's layout into a load plan, and prove that the plan fills every wanted element exactly once.

A plan is pure data: integers and names. Each rank makes its own, alone; no bytes of the checkpoint's data are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from shardferry._gc import paused_gc
from shardferry.checkpoint.catalog import Catalog, SavedTensor
from shardferry.checkpoint.optimizer_state import (
    SCALAR_STATE,
    OptimizerIndex,
    SavedOptimizer,
    index_optimizer,
    index_weights,
    parameter_shape,
    top_level_keys,
)
from shardferry.config import DtypePolicy, LoadRequest, StalePolicy, can_convert
from shardferry.errors import LayoutError, PlanError
from shardferry.layout.live import LiveLayout
from shardferry.layout.rank_layout import RankLayout
from shardferry.layout.spec import SpecLayout, spec_of
from shardferry.layout.tensor_layout import TensorLayout, sharded_dim
from shardferry.plan.cover import covering_chunks, identity_of_chunks
from shardferry.plan.load_plan import LoadPlan, PlannedTensor, PlannedValue, ReadItem, Section, dotted
from shardferry.plan.match_keys import (
    MatchedParam,
    check_globs,
    check_spec,
    find_state,
    find_weights,
    matched_keys,
    mismatch_error,
)
from shardferry.plan.split import copy_to_box
from shardferry.plan.state_layout import StateLayouts, tensors_beside
from shardferry.plan.tensor_classes import has_class, only_chunk
from shardferry.region import BoxCopy
from shardferry.state_dicts import KeyPath, LeftLive

ALIGNMENT = 256  # bytes; each tensor starts at a multiple, so that GPUs and direct I/O are content


@paused_gc()
def plan_load(
    catalog: Catalog,
    layout: RankLayout,
    request: LoadRequest,
    values: Mapping[str, Any] | None = None,
    *,
    with_reads: bool = True,
) -> LoadPlan:
    """Plan one rank's load of one optimizer, and of the weights where they are asked for.

    Args:
        values: the saved Python values by key, see `value_keys`; None in a dry run, which then can't tell a parameter that never
            stepped from one that was not saved.
        with_reads: whether the plan says where the tensors come from. Without it, holes and overlaps are not found.

    Raises:
        PlanError: nothing is saved under the key, a wanted parameter isn't there, an element is in no saved chunk
            (a hole) or in two (an overlap); the message names FQN and box. Or data files are younger than their metadata, and
            the request refuses that.
        LayoutError: a parameter can't lie as the layout says, or has another dtype than is wanted.
    """
    if catalog.stale and request.stale is StalePolicy.ERROR:
        raise PlanError(catalog.stale)
    index = index_optimizer(catalog, request.optimizer_key)
    saved = SavedOptimizer.resolve(index, values, request, layout.positions())
    spec = spec_of(layout)
    if (spec is not None and (spec.rules or spec.held_by)) or not request.selection.is_everything:
        names = saved.names | _names_beside(catalog, request, index)
        check_globs(request.selection, names)
        if spec is not None:
            state = None if request.optimizer_key is None else {**saved.unselected, **saved.state}
            here = {name for names_here in request.selection.wanted_names(names).values() for name in names_here}
            check_spec(spec, here, state)
    planner = _Planner(catalog, layout, request, values, with_reads=with_reads)
    found, missing = find_state(saved, layout, request, partial(_saved_shape, catalog, saved))
    planner.add_state(saved, found, index)
    weight_keys: dict[str, bool] = {}
    if request.model_key is not None:
        weights = saved_weights(catalog, request, index)
        found_weights, missing_weights = find_weights(weights, layout, request, catalog.weights_location)
        planner.add_weights(weights, found_weights)
        missing += missing_weights
        weight_keys = matched_keys(weights, found_weights)
    plan = planner.finish(
        objects=planned_objects(catalog, request, index) if layout.world_rank == 0 else {},
        fqns=tuple(parameter.fqn for parameter in found),
        missing=missing,
        param_groups=saved.groups_of({parameter.saved for parameter in found}),
        extras=saved.extras,
        state_keys=matched_keys(saved.state, found),
        weight_keys=weight_keys,
    )
    if spec is not None:
        _check_default(spec, catalog, plan)
    return plan


def _saved_shape(catalog: Catalog, saved: SavedOptimizer, fqn: str) -> tuple[int, ...] | None:
    """A parameter's shape as its state tells it."""
    entries = saved.state.get(fqn, {})
    return parameter_shape({name: catalog.tensors[e.key] for name, e in entries.items() if e.key in catalog.tensors})


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
    """The names of all other tensors below the model's key or their top-level key: parameters that never stepped, buffers.

    Parameters of other optimizers too: several may be loaded with one selection.
    """
    weights = () if request.model_key is None else _weights(catalog, request, index)
    return {*weights, *(_name_beside(path) for path, _ in tensors_beside(catalog, index))}


def _name_beside(path: KeyPath) -> str:
    is_state = len(path) > 3 and path[1] == "state"
    return str(path[2]) if is_state else ".".join(map(str, path[1:] or path))


def saved_weights(catalog: Catalog, request: LoadRequest, index: OptimizerIndex) -> dict[str, str]:
    """The keys of the saved weights by the FQNs that are used here. Raises PlanError.

    A renaming to several names gives way to a weight that was saved under one of these: tied ones are saved under each.
    """
    named: dict[str, str] = {}
    weights = _weights(catalog, request, index)
    wanted = request.selection.wanted_names(weights)
    own = {fqn for names in wanted.values() if len(names) == 1 for fqn in names}
    for saved, names in wanted.items():
        for fqn in names:
            if len(names) > 1 and fqn in own:
                continue
            if fqn in named:
                raise PlanError(f"{fqn}: two saved weights get this name, {saved!r} is one; narrow the renaming")
            if request.selection.selects(fqn):
                named[fqn] = weights[saved]
    return named


def _weights(catalog: Catalog, request: LoadRequest, index: OptimizerIndex) -> dict[str, str]:
    """The keys of the saved weights by the FQNs that were saved; the optimizer may lie beside or among them."""
    assert request.model_key is not None
    of_optimizer = set(index.all_keys())
    found = index_weights(catalog, request.model_key)
    weights = {fqn: key for fqn, key in found.items() if key not in of_optimizer}
    if not weights:
        raise PlanError(
            f"{catalog.weights_location}: under model_key {request.model_key!r} there is nothing but the optimizer's own state; "
            f"top-level keys are {', '.join(map(repr, top_level_keys(catalog, of_weights=True)))}"
        )
    return weights


def value_keys(catalog: Catalog, request: LoadRequest, index: OptimizerIndex) -> list[str]:
    """Keys that are read whole, once per job: the request's Python objects, and hyperparameters that are tensors."""
    weights = [] if request.model_key is None else list(_weights(catalog, request, index).values())
    beside = index.extras().values()
    objects = [key for key in dict.fromkeys((*index.all_keys(), *beside, *weights)) if key in catalog.objects]
    return objects + [key for key in (*index.param_groups.values(), *beside) if key in catalog.tensors]


def planned_objects(catalog: Catalog, request: LoadRequest, index: OptimizerIndex) -> dict[str, int]:
    """What is read whole, once per job: keys, and the bytes of their items."""
    objects, tensors = catalog.objects, catalog.tensors
    keys = value_keys(catalog, request, index)
    return {key: objects[key].byte_length if key in objects else tensors[key].nbytes for key in keys}


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


@dataclass
class _Planner:
    """Collects the tensors and reads of one rank, and gives each tensor its place in the arena."""

    catalog: Catalog
    layout: RankLayout
    request: LoadRequest
    saved_values: Mapping[str, Any] | None = None
    with_reads: bool = True
    tensors: list[PlannedTensor] = field(default_factory=list)
    reads: list[ReadItem] = field(default_factory=list)
    values: list[PlannedValue] = field(default_factory=list)
    mismatched: list[LayoutError] = field(default_factory=list)
    end: int = 0  # bytes, of the arena
    layouts: dict[TensorLayout, TensorLayout] = field(default_factory=dict)  # one of equal layouts
    # By id; the first layout keeps its id from being reused.
    layout_of: dict[int, tuple[TensorLayout, TensorLayout]] = field(default_factory=dict)
    # Most tensors of a model look like some other.
    known_copies: dict[tuple[object, ...], list[_ChunkCopy]] = field(default_factory=dict)

    def add_state(self, saved: SavedOptimizer, found: Sequence[MatchedParam], index: OptimizerIndex) -> None:
        """The state of the wanted parameters that are saved."""
        layouts = StateLayouts(self.catalog, saved, found, layout=self.layout, request=self.request, index=index)
        for parameter in found:
            for name, entry in saved.state.get(parameter.saved, {}).items():
                layout_for = partial(layouts.layout_for, parameter.fqn, name)
                self._add(entry.key, parameter.fqn, entry.path, "state", layout_for)

    def add_weights(self, weights: Mapping[str, str], found: Sequence[MatchedParam]) -> None:
        """The wanted weights and buffers that are saved."""
        for wanted in found:
            self._add(weights[wanted.saved], wanted.fqn, (), "model", partial(self._weight_layout, wanted.fqn))

    def _weight_layout(self, fqn: str, saved: SavedTensor) -> tuple[TensorLayout, bool]:
        return self.layout.weight(fqn, saved.shape), True

    def _add(
        self,
        key: str,
        fqn: str,
        path: KeyPath,
        section: Section,
        layout_for: Callable[[SavedTensor], tuple[TensorLayout, bool]],
    ) -> None:
        """A saved tensor, or a Python value in its place."""
        tensor = self.catalog.tensors.get(key)
        if tensor is None:
            value = None if self.saved_values is None else self.saved_values[key]
            if not isinstance(value, LeftLive):
                self.values.append(PlannedValue(key, fqn, path, value, section))
            return
        try:
            layout, follows = layout_for(tensor)
            cast, chunk = self._cast(fqn, dotted(path), tensor), None
            if section == "state" and layout.boxes and has_class(self.catalog, tensor):
                chunk = only_chunk(self.catalog, tensor, layout, fqn=fqn, name=dotted(path))
        except LayoutError as error:
            self.mismatched.append(error)
        else:
            self.add_tensor(
                tensor,
                layout,
                fqn=fqn,
                path=path,
                section=section,
                cast=cast,
                sharded_like_param=follows,
                chunk=chunk,
            )

    def _cast(self, fqn: str, name: str, saved: SavedTensor) -> torch.dtype | None:
        """The dtype to convert to. Raises LayoutError where that must be asked for, and wasn't."""
        wanted = self.layout.dtype(fqn, name) or self.request.wanted_dtype(name)
        if wanted is None or wanted == saved.dtype or name in SCALAR_STATE:
            return None
        convertible = can_convert(saved.dtype, wanted)
        if convertible and self.request.dtype is DtypePolicy.CAST:
            return wanted
        what = f"{name!r}" if name else "the weight"
        way_out = "to convert it set dtype: cast" if convertible else "a cast between these would lose the numbers"
        raise LayoutError(f"{fqn}: {what} was saved as {saved.dtype} and is wanted as {wanted}; {way_out}")

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
        chunk: int | None = None,
    ) -> None:
        row, layout = len(self.tensors), self._one_of(layout)
        tensor = PlannedTensor(
            key=saved.key,
            fqn=fqn,
            path=path,
            dtype=saved.dtype,
            layout=layout,
            arena_offset=self.end,
            section=section,
            cast=cast,
            sharded_like_param=sharded_like_param,
            chunk=chunk,
        )
        self.tensors.append(tensor)
        self.end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        if self.with_reads and chunk is None:
            first = saved.chunks.start
            self.reads += [
                ReadItem(row, first + chunk, chunk_shape, copy)
                for chunk, chunk_shape, copy in self._copies(saved, layout)
            ]

    def _one_of(self, layout: TensorLayout) -> TensorLayout:
        """One of equal layouts: they are compared and sent to other ranks more often than they are made."""
        known = self.layout_of.get(id(layout))
        if known is None:
            known = self.layout_of[id(layout)] = (layout, self.layouts.setdefault(layout, layout))
        return known[1]

    def _copies(self, saved: SavedTensor, layout: TensorLayout) -> list[_ChunkCopy]:
        same = (id(layout), *identity_of_chunks(self.catalog, saved))
        if same not in self.known_copies:
            self.known_copies[same] = [
                (chunk - saved.chunks.start, region.sizes, copy)
                for box in layout.boxes
                for chunk, region in covering_chunks(self.catalog, saved, box.region)
                if (copy := copy_to_box(region, layout, box)) is not None
            ]
        return self.known_copies[same]

    def finish(self, **known: Any) -> LoadPlan:
        """The plan. Raises LayoutError where something didn't fit."""
        if self.mismatched:
            raise mismatch_error(self.mismatched)
        return LoadPlan(
            world_rank=self.layout.world_rank,
            world_size=self.layout.world_size,
            mesh=self.layout.mesh,
            request=self.request,
            tensors=tuple(self.tensors),
            reads=tuple(self.reads),
            values=tuple(self.values),
            arena_bytes=self.end,
            **known,
        )
