"""Name the ranks of a job by mesh axes, and parse the placement, one of torch's own, that each axis has for a tensor."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from torch.distributed.tensor import Placement, Replicate, Shard

from shardferry.errors import LayoutError

_PLACEMENT = re.compile(r"\s*(?:Replicate(?:\(\s*\))?|Shard\(\s*(?:dim\s*=\s*)?(\d+)\s*\))\s*")


def parse_placement(text: str) -> Placement:
    """Parse ``"Shard(0)"`` or ``"Replicate"``, or what torch prints for one: ``"Shard(dim=0)"``, ``"Replicate()"``.

    Raises:
        LayoutError: any other text; a negative dimension too.
    """
    match = _PLACEMENT.fullmatch(text)
    if match is None:
        raise LayoutError(f"{text!r} is not a placement; write 'Shard(<dim>)' or 'Replicate'")
    return Replicate() if match[1] is None else Shard(int(match[1]))


@dataclass(frozen=True, slots=True)
class Mesh:
    """Named axes and their sizes, outermost first. World ranks are the row-major positions in the mesh."""

    axes: tuple[tuple[str, int], ...]  # name, number of ranks

    @property
    def size(self) -> int:
        """The number of ranks."""
        return math.prod(size for _, size in self.axes)

    @property
    def names(self) -> tuple[str, ...]:
        """The axes' names, outermost first."""
        return tuple(name for name, _ in self.axes)

    def coordinate(self, world_rank: int) -> tuple[int, ...]:
        """A rank's index on each axis, outermost first. That the rank is below `size` is not checked."""
        coordinate = []
        for _, size in reversed(self.axes):
            world_rank, index = divmod(world_rank, size)
            coordinate.append(index)
        return tuple(reversed(coordinate))

    def __str__(self) -> str:
        return " x ".join(f"{name}={size}" for name, size in self.axes)
