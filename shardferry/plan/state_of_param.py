"""What is known of one parameter and its saved state, for the rules of `saved_parts` and `quantised`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shardferry.checkpoint.catalog import SavedTensor

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StateOfParam:
    """The saved state of one parameter, and what is known of the parameter."""

    entries: Mapping[str, SavedTensor]  # by state name
    shape: Shape | None  # of the whole parameter; None: not known
    part_shapes: frozenset[Shape]  # smaller ones, that ranks hold now or held when the weight was saved
