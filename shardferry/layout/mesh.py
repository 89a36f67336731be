"""Name the ranks by a mesh of axes, and say by a placement what each axis does to a tensor."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from shardferry.errors import LayoutError


@dataclass(frozen=True, slots=True)
class Replicate:
    """Every rank of the axis holds the same."""

    def __str__(self) -> str:
        return "Replicate"


@dataclass(frozen=True, slots=True)
class Shard:
    """The axis cuts dimension ``dim`` into chunks of ``ceil(size / ranks)``; the last ones may be short or empty."""

    dim: int

    def __str__(self) -> str:
        return f"Shard({self.dim})"


Placement = Replicate | Shard

_PLACEMENT = re.compile(r"\s*(?:Replicate(?:\(\s*\))?|Shard\(\s*(?:dim\s*=\s*)?(\d+)\s*\))\s*")


def parse_placement(text: str) -> Placement:
    """``"Shard(0)"`` or ``"Replicate"``. Raises LayoutError for anything else."""
    match = _PLACEMENT.fullmatch(text)
    if match is None:
        raise LayoutError(f"{text!r} is no placement; write 'Shard(<dim>)' or 'Replicate'")
    return Replicate() if match[1] is None else Shard(int(match[1]))


@dataclass(frozen=True, slots=True)
class Mesh:
    """Named axes with their sizes, outermost first: rank ``r`` stands at the row-major coordinate of ``r``."""

    axes: tuple[tuple[str, int], ...]

    @property
    def size(self) -> int:
        return math.prod(size for _, size in self.axes)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.axes)

    def coordinate(self, world_rank: int) -> tuple[int, ...]:
        coordinate = []
        for _, size in reversed(self.axes):
            world_rank, index = divmod(world_rank, size)
            coordinate.append(index)
        return tuple(reversed(coordinate))

    def __str__(self) -> str:
        return " x ".join(f"{name}={size}" for name, size in self.axes)
