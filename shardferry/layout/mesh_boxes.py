"""Work out the boxes of a tensor that all ranks of a mesh hold, at once: one array operation a mesh axis, not one a rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shardferry.layout.mesh import Mesh, Placement, Shard
from shardferry.region import Region


class MeshBoxes:
    """The box of one tensor on each of some ranks; the same boxes as `shardferry.layout.tensor_layout.sharded` gives one by one.

    Args:
        placements: by mesh axis, outermost first; every one fits the shape.
        world_ranks: ascending.
    """

    def __init__(
        self, shape: Sequence[int], mesh: Mesh, placements: Sequence[Placement], world_ranks: np.ndarray
    ) -> None:
        self.world_ranks = world_ranks
        self.offsets = np.zeros((len(world_ranks), len(shape)), dtype=np.int64)
        self.sizes = np.tile(np.array(shape, dtype=np.int64), (len(world_ranks), 1))
        indices = np.unravel_index(world_ranks, [size for _, size in mesh.axes])
        for (_, num_ranks), index, placement in reversed(list(zip(mesh.axes, indices, placements, strict=True))):
            if isinstance(placement, Shard):
                self._cut(placement.dim, num_ranks, index)

    def _cut(self, dim: int, num_ranks: int, index: np.ndarray) -> None:
        sizes = self.sizes[:, dim]
        full = -(-sizes // num_ranks)
        start = np.minimum(index * full, sizes)
        self.offsets[:, dim] += start
        self.sizes[:, dim] = np.minimum(full, sizes - start)

    def holders(self, region: Region) -> list[int]:
        """The ranks whose box has an element of a region, ascending."""
        starts = np.maximum(self.offsets, region.offsets)
        ends = np.minimum(self.offsets + self.sizes, region.ends)
        found: list[int] = self.world_ranks[(starts < ends).all(axis=1)].tolist()
        return found


def ranks_within(mesh: Mesh, world_ranks: np.ndarray, kept_to: Sequence[tuple[int, ...] | None]) -> np.ndarray:
    """Those of some ranks whose coordinate on each axis is one of ``kept_to`` (None: any)."""
    indices = np.unravel_index(world_ranks, [size for _, size in mesh.axes])
    inside = np.ones(len(world_ranks), dtype=bool)
    for index, kept in zip(indices, kept_to, strict=True):
        if kept is not None:
            inside &= np.isin(index, kept)
    return world_ranks[inside]
