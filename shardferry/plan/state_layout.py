"""Give each saved state tensor its layout: moments follow their parameter, factors and statistics don't.

Only state with its parameter's shape can follow the parameter. That is not enough: the statistics of a square matrix are square
too. So a state name that has another shape than its parameter once follows no parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

from shardferry.checkpoint.catalog import Catalog, SavedTensor
from shardferry.checkpoint.optimizer_state import SCALAR_STATE, OptimizerIndex, SavedOptimizer, parameter_shape
from shardferry.config import LoadRequest
from shardferry.errors import LayoutError
from shardferry.layout.rank_layout import RankLayout
from shardferry.layout.tensor_layout import TensorLayout, replicated
from shardferry.plan.match_keys import MatchedParam
from shardferry.state_dicts import KeyPath

Shape = tuple[int, ...]


class ParameterRule:
    """Tells which state tensors are laid out as their parameter.

    Args:
        tensors: all saved state tensors, by FQN and state name.
        known_shape: a parameter's whole shape by its FQN, in elements; None where only its state can tell.
    """

    def __init__(
        self, tensors: Mapping[str, Mapping[str, SavedTensor]], known_shape: Callable[[str], Shape | None]
    ) -> None:
        self._tensors = tensors
        self._known_shape = known_shape

    def follows(self, fqn: str, name: str, saved: SavedTensor) -> bool:
        """Whether a state tensor that has no layout of its own is laid out as its parameter."""
        if name in SCALAR_STATE or name in self._factors:
            return False
        known = self._known_shape(fqn)
        return saved.shape == (parameter_shape(self._tensors[fqn]) if known is None else known)

    @cached_property
    def _factors(self) -> frozenset[str]:
        """State names that have another shape than their parameter at least once."""
        return frozenset(
            name
            for fqn, tensors in self._tensors.items()
            if (known := self._known_shape(fqn)) is not None
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
        self._weights = _weight_shapes(catalog, request, index)
        self._rule = ParameterRule(self._tensors, self._known_shape)

    def layout_for(self, fqn: str, name: str, saved: SavedTensor) -> tuple[TensorLayout, bool]:
        """The layout of one state tensor on this rank, and whether it is the parameter's own.

        Raises:
            LayoutError: the state can't belong to this model's parameter, or the parameter can't have this layout.
        """
        own = self._layout.entry(fqn, name, saved.shape)
        if own is not None:
            return own, False
        self._check_same_model(fqn, name, saved)
        if self._rule.follows(fqn, name, saved):
            return self._layout.parameter(fqn, saved.shape), True
        return replicated(saved.shape), False

    def _known_shape(self, fqn: str) -> Shape | None:
        live = self._layout.parameter_shape(fqn)
        return live if live is not None else self._weights.get(fqn)

    def _check_same_model(self, fqn: str, name: str, saved: SavedTensor) -> None:
        """Moments of another model's parameter must not pass as factors of this one's."""
        live = self._layout.parameter_shape(fqn)
        if live is None or name in SCALAR_STATE:
            return
        there = self._weights.get(fqn)
        if there is None or there == live:
            return
        raise LayoutError(
            f"{fqn}: the model's parameter has the shape {live}, the saved one {there} ({name!r} has {saved.shape}); "
            "this checkpoint belongs to another model"
        )


def _tensors(catalog: Catalog, saved: SavedOptimizer, parameter: MatchedParam) -> dict[str, SavedTensor]:
    entries = saved.state.get(parameter.saved, {})
    return {name: catalog.tensors[entry.key] for name, entry in entries.items() if entry.key in catalog.tensors}


def tensors_beside(catalog: Catalog, index: OptimizerIndex) -> Iterator[tuple[KeyPath, SavedTensor]]:
    """The path of every tensor that is not the optimizer's, and the tensor: weights, also of what never stepped, and buffers."""
    of_optimizer = set(index.all_keys())
    return ((catalog.path(key), saved) for key, saved in catalog.tensors.items() if key not in of_optimizer)


def _weight_shapes(catalog: Catalog, request: LoadRequest, index: OptimizerIndex) -> dict[str, Shape]:
    """Shapes of the tensors that were saved beside the optimizer, by FQN below their top-level key."""
    shapes: dict[str, Shape] = {}
    saved_names: dict[str, Shape] = {}
    for path, saved in tensors_beside(catalog, index):
        if len(path) > 1:
            saved_names.setdefault(".".join(map(str, path[1:])), saved.shape)
    for name, names in request.selection.wanted_names(saved_names).items():
        for fqn in names:
            shapes.setdefault(fqn, saved_names[name])
    return shapes
