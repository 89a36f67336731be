"""Tell state that lies as its parameter does from state that doesn't: moments follow, factors and statistics don't.

Only state of its parameter's shape can follow the parameter. That is not enough: the statistics of a square matrix are square
too. So a name that has another shape than its parameter anywhere is never cut as a parameter anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from shardferry.checkpoint.catalog import Catalog, SavedTensor
from shardferry.checkpoint.optimizer_state import SCALAR_STATE, OptimizerIndex, SavedOptimizer, parameter_shape
from shardferry.config import LoadRequest
from shardferry.errors import LayoutError
from shardferry.layout.tensor_layout import RankLayout, TensorLayout, replicated
from shardferry.plan.match_keys import Found

Shape = tuple[int, ...]


class StateShapes:
    """Knows the parameters' shapes: from the live model, from the weights beside the optimizer, or from the state itself."""

    def __init__(
        self,
        catalog: Catalog,
        saved: SavedOptimizer,
        found: Sequence[Found],
        layout: RankLayout,
        request: LoadRequest,
        index: OptimizerIndex,
    ) -> None:
        self._layout = layout
        self._tensors = {parameter.fqn: _tensors(catalog, saved, parameter) for parameter in found}
        self._weights = _weight_shapes(catalog, request, index)

    def lies(self, fqn: str, name: str, saved: SavedTensor) -> tuple[TensorLayout, bool]:
        """How one state tensor lies on this rank, and whether that is as its parameter does.

        Raises:
            LayoutError: the state can't be of this model's parameter, or the parameter can't lie so.
        """
        own = self._layout.entry(fqn, name, saved.shape)
        if own is not None:
            return own, False
        self._check_same_model(fqn, name, saved)
        if self.follows(fqn, name, saved):
            return self._layout.parameter(fqn, saved.shape), True
        return replicated(saved.shape), False

    def follows(self, fqn: str, name: str, saved: SavedTensor) -> bool:
        """Whether a state tensor that has no layout of its own lies as its parameter does."""
        return name not in SCALAR_STATE and name not in self._factors and saved.shape == self._shape(fqn)

    def _shape(self, fqn: str) -> Shape | None:
        known = self._known_shape(fqn)
        return known if known is not None else parameter_shape(self._tensors[fqn])

    def _known_shape(self, fqn: str) -> Shape | None:
        live = self._layout.parameter_shape(fqn)
        return live if live is not None else self._weights.get(fqn)

    @cached_property
    def _factors(self) -> frozenset[str]:
        """Names that somewhere have not their parameter's shape."""
        return frozenset(
            name
            for fqn, tensors in self._tensors.items()
            if (known := self._known_shape(fqn)) is not None
            for name, tensor in tensors.items()
            if tensor.shape != known
        )

    def _check_same_model(self, fqn: str, name: str, saved: SavedTensor) -> None:
        """Moments of another model's parameter must not pass as factors of this one's."""
        live = self._layout.parameter_shape(fqn)
        if live is None or name in SCALAR_STATE:
            return
        weight = self._weights.get(fqn)
        there = parameter_shape(self._tensors[fqn]) if weight is None else weight
        if there is None or there == live or (weight is None and _may_be_factor(there, live)):
            return
        raise LayoutError(
            f"{fqn}: the model's parameter has the shape {live}, the saved one {there} ({name!r} has {saved.shape}); "
            "this checkpoint belongs to another model"
        )


def _may_be_factor(shape: Shape, parameter: Shape) -> bool:
    """Whether a shape is what is left of a parameter's when dimensions are reduced, to 1 or to nothing."""
    if len(shape) == len(parameter):
        return all(size in (1, whole) for size, whole in zip(shape, parameter, strict=True))
    rest = iter(parameter)
    return all(size == 1 or size in rest for size in shape)  # a subsequence


def _tensors(catalog: Catalog, saved: SavedOptimizer, parameter: Found) -> dict[str, SavedTensor]:
    entries = saved.state.get(parameter.saved, {})
    return {name: catalog.tensors[entry.key] for name, entry in entries.items() if entry.key in catalog.tensors}


def _weight_shapes(catalog: Catalog, request: LoadRequest, index: OptimizerIndex) -> dict[str, Shape]:
    """Shapes of all that was saved beside the optimizer, by what it is called below its top-level key."""
    shapes: dict[str, Shape] = {}
    of_optimizer = set(index.all_keys())
    for key, saved in catalog.tensors.items():
        if key in of_optimizer:
            continue
        path = catalog.path(key)
        if len(path) > 1:
            shapes.setdefault(request.selection.wanted_name(".".join(map(str, path[1:]))), saved.shape)
    return shapes
