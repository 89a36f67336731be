"""Give each saved state tensor its layout: moments follow their parameter, factors and statistics don't.

Only state with its parameter's shape can follow the parameter. That is not enough: the statistics of a square matrix are square
too. So a state name that has another shape than its parameter once follows no parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property

from shardferry.checkpoint.catalog import Catalog, SavedTensor
from shardferry.checkpoint.optimizer_state import (
    SCALAR_STATE,
    OptimizerIndex,
    SavedOptimizer,
    index_weights,
    parameter_shape,
)
from shardferry.config import LoadRequest
from shardferry.errors import LayoutError
from shardferry.layout.rank_layout import RankLayout
from shardferry.layout.tensor_layout import TensorLayout, replicated, single_box
from shardferry.plan.match_keys import MatchedParam
from shardferry.plan.quantised import CODE_DTYPES, QuantisedEntries, part_of_scales
from shardferry.plan.saved_parts import local_part_names
from shardferry.plan.state_of_param import StateOfParam
from shardferry.region import Region
from shardferry.state_dicts import KeyPath

Shape = tuple[int, ...]


class ParameterRule:
    """Tells which state tensors are laid out as their parameter.

    Args:
        tensors: all saved state tensors, by FQN and state name.
        known_shapes: the parameters' whole shapes by FQN, in elements; None where only the state can tell.
    """

    def __init__(
        self, tensors: Mapping[str, Mapping[str, SavedTensor]], known_shapes: Mapping[str, Shape | None]
    ) -> None:
        self._tensors = tensors
        self._known_shapes = known_shapes

    def follows(self, fqn: str, name: str, saved: SavedTensor) -> bool:
        """Whether a state tensor that has no layout of its own is laid out as its parameter."""
        if name in SCALAR_STATE or name in self._factors:
            return False
        known = self._known_shapes.get(fqn)
        return saved.shape == (parameter_shape(self._tensors[fqn]) if known is None else known)

    @cached_property
    def _factors(self) -> frozenset[str]:
        """State names that have another shape than their parameter at least once."""
        return frozenset(
            name
            for fqn, tensors in self._tensors.items()
            if (known := self._known_shapes.get(fqn)) is not None
            for name, tensor in tensors.items()
            if tensor.shape != known
        )


class StateLayouts:
    """Gives state tensors their layouts. A parameter's shape comes from the live model, the saved weights, or the state itself."""

    def __init__(
        self,
        catalog: Catalog,
        saved: SavedOptimizer,
        found: Sequence[MatchedParam],
        layout: RankLayout,
        request: LoadRequest,
        index: OptimizerIndex,
    ) -> None:
        self._layout = layout
        self._tensors = {parameter.fqn: _tensors(catalog, saved, parameter) for parameter in found}
        self._weights = _weights(catalog, request, index)
        self._catalog = catalog
        self._known_shapes = {fqn: self._known_shape(fqn) for fqn in self._tensors}
        self._rule = ParameterRule(self._tensors, self._known_shapes)

    def layout_for(self, fqn: str, name: str, saved: SavedTensor) -> tuple[TensorLayout, bool]:
        """The layout of one state tensor on this rank, and whether it is the parameter's own.

        Raises:
            LayoutError: the state can't belong to this model's parameter, the parameter can't have this layout, or the saved
                state is one that no rank can be given a part of (`saved_parts`, `quantised`).
        """
        if self._has_codes and (codes := self._quantised.codes_of(fqn, name)) is not None:
            of_scales = self._scales_layout(fqn, name, saved, codes)
            if of_scales is not None:
                return of_scales, False
        own = self._own_layout(fqn, name, saved)
        follows = own is None and self._rule.follows(fqn, name, saved)
        layout = own or (self._layout.parameter(fqn, saved.shape) if follows else replicated(saved.shape))
        if saved.dtype in CODE_DTYPES:
            self._check_codes(fqn, name, saved, layout)
        return layout, follows

    def _scales_layout(self, fqn: str, name: str, saved: SavedTensor, codes_name: str) -> TensorLayout | None:
        """The layout of scales whose codes this rank wants a part of: that part's. None: it wants all, or one scale is for all."""
        codes = self._tensors[fqn][codes_name]
        of_codes, _ = self.layout_for(fqn, codes_name, codes)
        if of_codes.wanted_numel == math.prod(codes.shape) or math.prod(saved.shape) == 1:
            return None
        region = (
            of_codes.boxes[0].region if of_codes.boxes else Region((0,) * len(codes.shape), (0,) * len(codes.shape))
        )
        part = part_of_scales(codes.shape, saved.shape, region)
        assert part is not None, "the codes' layout was checked"
        try:
            own = self._layout.entry(fqn, name, saved.shape)
        except LayoutError:
            if self._layout.entry(fqn, name, part.sizes) is None:
                raise
            own = None  # the live optimizer has a plain tensor of its part
        if own is None:
            return single_box(saved.shape, part)
        wanted = [box.region for box in own.boxes]
        if wanted != ([part] if part.numel else []) and own.wanted_numel < math.prod(saved.shape):
            raise LayoutError(
                f"{fqn}: quantised state: this rank wants the elements {region} of the codes {codes_name!r}, whose scales are "
                f"{part} of {name!r}, but the optimizer or the spec gives it {', '.join(map(str, wanted)) or 'none'}. "
                "Shard both alike"
            )
        return own

    def _own_layout(self, fqn: str, name: str, saved: SavedTensor) -> TensorLayout | None:
        """The layout that the optimizer or the spec gives this entry alone. Raises LayoutError."""
        try:
            own = self._layout.entry(fqn, name, saved.shape)
        except LayoutError:
            self._check_whole(fqn, name, saved)
            raise
        if own is None:
            self._check_whole(fqn, name, saved)
            self._check_same_model(fqn, name, saved)
        return own

    def _check_whole(self, fqn: str, name: str, saved: SavedTensor) -> None:
        """One rank's part must not pass as a factor of the whole."""
        shape = self._known_shapes[fqn]
        if name in SCALAR_STATE or saved.shape == shape or len(saved.chunks) > 1 or name not in self._local_parts:
            return
        raise LayoutError(
            f"{fqn}: {name!r} was saved as one plain tensor of the shape {saved.shape}, the parameter has the shape {shape}: it is "
            "one rank's part, and those of the other ranks were not saved. Save moments as DTensors like their parameters, or "
            "leave the parameter out with exclude"
        )

    def _check_codes(self, fqn: str, name: str, saved: SavedTensor, layout: TensorLayout) -> None:
        """Codes of quantised state must not be cut from their scales."""
        apart = self._quantised.scales_apart(fqn, name, layout, is_param_cut=self._is_cut(fqn))
        if apart is None:
            return
        scales = self._tensors[fqn][apart]
        raise LayoutError(
            f"{fqn}: quantised state: {name!r} has {saved.dtype} codes of the shape {saved.shape} in {len(saved.chunks)} saved "
            f"chunks, of which this rank wants {layout.wanted_numel} of {math.prod(saved.shape)} elements; it can't be told which of "
            f"{apart!r}, of the shape {scales.shape} in {len(scales.chunks)} saved chunks, belongs to a part: parts must have been "
            "saved by each rank, and end between blocks that have a scale each. Load it where each rank holds the whole parameter, "
            "as it was saved; leave the parameter out with exclude; or save it dequantised"
        )

    @cached_property
    def _has_codes(self) -> bool:
        return any(saved.dtype in CODE_DTYPES for tensors in self._tensors.values() for saved in tensors.values())

    @cached_property
    def _quantised(self) -> QuantisedEntries:
        return QuantisedEntries(self._states, self._catalog.region)

    @cached_property
    def _states(self) -> dict[str, StateOfParam]:
        return {
            fqn: StateOfParam(tensors, self._known_shapes[fqn], self._part_shapes(fqn))
            for fqn, tensors in self._tensors.items()
        }

    @cached_property
    def _local_parts(self) -> frozenset[str]:
        return local_part_names(self._states)

    def _part_shapes(self, fqn: str) -> frozenset[Shape]:
        """Shapes of a parameter's parts: of this rank's, and of those that its weight was saved in."""
        weight, shape = self._weights.get(fqn), self._known_shapes[fqn]
        shapes: set[Shape] = set()
        if weight is not None and len(weight.chunks) > 1:
            shapes.update(map(tuple, self._catalog.boxes(weight)[1].tolist()))
        if shape is not None:
            with suppress(LayoutError):  # told where the parameter's own state is planned
                shapes.add(self._layout.parameter(fqn, shape).local_shape)
        return frozenset(part for part in shapes if part != shape and 0 not in part)

    def _is_cut(self, fqn: str) -> bool:
        """Whether this rank holds a part of a parameter. Raises LayoutError: the parameter can't have its layout."""
        shape = self._known_shapes[fqn]
        return shape is not None and self._layout.parameter(fqn, shape).wanted_numel < math.prod(shape)

    def _known_shape(self, fqn: str) -> Shape | None:
        live = self._layout.parameter_shape(fqn)
        weight = self._weights.get(fqn)
        return live if live is not None or weight is None else weight.shape

    def _check_same_model(self, fqn: str, name: str, saved: SavedTensor) -> None:
        """Moments of another model's parameter must not pass as factors of this one's."""
        live = self._layout.parameter_shape(fqn)
        if live is None or name in SCALAR_STATE:
            return
        there = self._weights.get(fqn)
        if there is None or there.shape == live:
            return
        raise LayoutError(
            f"{fqn}: the model's parameter has the shape {live}, the saved one {there.shape} ({name!r} has {saved.shape}); "
            "this checkpoint belongs to another model"
        )


def _tensors(catalog: Catalog, saved: SavedOptimizer, parameter: MatchedParam) -> dict[str, SavedTensor]:
    entries = saved.state.get(parameter.saved, {})
    return {name: catalog.tensors[entry.key] for name, entry in entries.items() if entry.key in catalog.tensors}


def tensors_beside(catalog: Catalog, index: OptimizerIndex) -> Iterator[tuple[KeyPath, SavedTensor]]:
    """The path of every tensor that is not the optimizer's, and the tensor: weights, also of what never stepped, and buffers."""
    of_optimizer = set(index.all_keys())
    return ((catalog.path(key), saved) for key, saved in catalog.tensors.items() if key not in of_optimizer)


def _weights(catalog: Catalog, request: LoadRequest, index: OptimizerIndex) -> dict[str, SavedTensor]:
    """The model's weights by FQN: under its key; without one, those that were saved under any top-level key.

    Several models may have weights of one name: without a key, one that was saved in several shapes is left out.
    """
    found: dict[str, list[SavedTensor]] = {}
    if request.model_key is None:
        for path, saved in tensors_beside(catalog, index):
            if len(path) > 1:
                found.setdefault(".".join(map(str, path[1:])), []).append(saved)
    else:
        keys = index_weights(catalog, request.model_key)
        found = {fqn: [catalog.tensors[key]] for fqn, key in keys.items() if key in catalog.tensors}
    known = {fqn: saved[0] for fqn, saved in found.items() if len({one.shape for one in saved}) == 1}
    weights: dict[str, SavedTensor] = {}
    for name, names in request.selection.wanted_names(known).items():
        for fqn in names:
            weights.setdefault(fqn, known[name])
    return weights
