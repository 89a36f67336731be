"""Turn a target topology, as people write it, into the layouts of its ranks: one by one, or all of them as columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np
from torch.distributed.tensor import Placement, Replicate

from shardferry.errors import LayoutError
from shardferry.layout.mesh import Mesh
from shardferry.layout.rank_layout import RankLayout
from shardferry.layout.tensor_layout import AxisCut, TensorLayout, shard_on_mesh, sharded_dim
from shardferry.region import Region

_REPLICATE = Replicate()


@dataclass(frozen=True, slots=True)
class Rule:
    """Placements for the parameters whose FQN matches a shell glob; axes that aren't named replicate.

    With ``state``, a glob over state names, the rule is for those state entries only, whatever their shape.
    """

    match: str
    placements: Mapping[str, Placement]  # by axis; Shard or Replicate
    state: str | None = None


@dataclass(frozen=True, slots=True)
class HeldBy:
    """Parameters that only some coordinates of some axes hold: a pipeline stage's layers, a rank's experts."""

    match: str  # shell glob over FQNs
    coordinates: Mapping[str, tuple[int, ...]]  # by axis


@dataclass(frozen=True)
class SpecLayout:
    """A target topology: a mesh, rules, and a default. The first rule that matches a parameter decides.

    Raises:
        LayoutError: an axis that the mesh doesn't have, or a coordinate outside its axis.
    """

    mesh: Mesh
    rules: tuple[Rule, ...] = ()
    default: Mapping[str, Placement] | None = None  # by axis, for parameters that no rule matches
    held_by: tuple[HeldBy, ...] = ()  # the first match per axis decides; every coordinate holds the other parameters
    # By FQN: the ranks of a node ask for each parameter once per state entry.
    _known: dict[tuple[str, int | None], tuple[Placement, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        rules = [(f"rule {rule.match!r}", rule.placements) for rule in self.rules]
        held_by = [(f"held_by {held.match!r}", held.coordinates) for held in self.held_by]
        for where, axes in (*rules, ("default", self.default or {}), *held_by):
            for axis in axes:
                if axis not in self.mesh.names:
                    raise LayoutError(
                        f"{where}: axis {axis!r} is not in the mesh, which has {', '.join(self.mesh.names)}"
                    )
        sizes = dict(self.mesh.axes)
        for held in self.held_by:
            for axis, coordinates in held.coordinates.items():
                if not coordinates or not all(0 <= index < sizes[axis] for index in coordinates):
                    raise LayoutError(
                        f"held_by {held.match!r}: {axis}: {list(coordinates)} are not coordinates of an axis of {sizes[axis]}; "
                        f"give some of 0 to {sizes[axis] - 1}"
                    )

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self.mesh.size

    def rank(self, world_rank: int) -> SpecRank:
        """The layout of one rank. That the rank is below `world_size` is not checked."""
        return SpecRank(self, world_rank)

    def placements(self, fqn: str, ndim: int | None = None) -> tuple[Placement, ...]:
        """The placements of a parameter, by mesh axis, outermost first.

        Args:
            ndim: the parameter's dimensions; None: placements are taken as they are written. A dimension that the parameter
                lacks replicates if the default asks for it. If a rule does, it is kept, and can't be laid out; but a
                parameter of 0 dimensions is replicated unless the rule is its FQN.
        """
        if (fqn, ndim) not in self._known:
            rule = next((rule for rule in self.rules if not rule.state and fnmatchcase(fqn, rule.match)), None)
            found = self._by_axis((self.default or {}) if rule is None else rule.placements)
            if ndim is not None and (rule is None or (ndim == 0 and rule.match != fqn)):
                found = tuple(_REPLICATE if getattr(p, "dim", -1) >= ndim else p for p in found)
            self._known[fqn, ndim] = found
        return self._known[fqn, ndim]

    def entry_placements(self, fqn: str, name: str) -> tuple[Placement, ...] | None:
        """The placements of one state entry, by mesh axis, outermost first; None if no rule is for this entry."""
        for rule in self.rules:
            if rule.state and fnmatchcase(name, rule.state) and fnmatchcase(fqn, rule.match):
                return self._by_axis(rule.placements)
        return None

    def _by_axis(self, placements: Mapping[str, Placement]) -> tuple[Placement, ...]:
        return tuple(placements.get(axis, _REPLICATE) for axis in self.mesh.names)

    def holder_coordinates(self, fqn: str) -> tuple[tuple[int, ...] | None, ...]:
        """By mesh axis, the coordinates that hold any part of a parameter; None: all of them."""
        return tuple(
            next(
                (h.coordinates[axis] for h in self.held_by if axis in h.coordinates and fnmatchcase(fqn, h.match)), None
            )
            for axis in self.mesh.names
        )


class SpecRank(RankLayout):
    """What one rank of a spec holds. Only the checkpoint knows the parameters, their shapes and dtypes."""

    def __init__(self, spec: SpecLayout, world_rank: int) -> None:
        self.spec = spec
        self.world_rank = world_rank
        self.world_size = spec.world_size
        self.mesh = spec.mesh
        self._coordinate = spec.mesh.coordinate(world_rank)
        # By shape and placements: a model has a dozen of these, and thousands of tensors.
        self._known_layouts: dict[tuple[tuple[int, ...], tuple[Placement, ...]], TensorLayout] = {}

    def holds(self, fqn: str) -> bool:
        holders = self.spec.holder_coordinates(fqn)
        return all(kept is None or index in kept for kept, index in zip(holders, self._coordinate, strict=True))

    def parameter(self, fqn: str, shape: tuple[int, ...]) -> TensorLayout:
        return self._shard(fqn, shape, self.spec.placements(fqn, len(shape)))

    def entry(self, fqn: str, name: str, shape: tuple[int, ...]) -> TensorLayout | None:
        placements = self.spec.entry_placements(fqn, name)
        return None if placements is None else self._shard(f"{fqn}: {name!r}", shape, placements)

    def weight(self, fqn: str, shape: tuple[int, ...]) -> TensorLayout:
        return self.parameter(fqn, shape)

    def _shard(self, where: str, shape: tuple[int, ...], placements: tuple[Placement, ...]) -> TensorLayout:
        layout = self._known_layouts.get((shape, placements))
        if layout is None:
            sizes = (size for _, size in self.spec.mesh.axes)
            cuts = list(map(AxisCut, sizes, self._coordinate, placements))
            try:
                layout = self._known_layouts[shape, placements] = shard_on_mesh(shape, cuts)
            except LayoutError as error:
                raise LayoutError(f"{where}: {error}") from None
        return layout


def spec_of(layout: RankLayout) -> SpecLayout | None:
    """The spec that gives the layout of every rank, not only of this one; None for the layout of a live model."""
    return layout.spec if isinstance(layout, SpecRank) else None


class MeshBoxes:
    """The region of one tensor on each of several ranks, as columns.

    They are those that `shard_on_mesh` gives rank by rank, computed with one array operation per mesh axis.

    Args:
        shape: the tensor's global shape.
        mesh: all ranks.
        placements: by mesh axis, outermost first; Shard and Replicate. It is not checked that they fit the shape.
        world_ranks: ``int64[n]``, the ranks to compute, ascending.

    Attributes:
        offsets, sizes: ``int64[n, ndim]``, elements.
    """

    def __init__(
        self, shape: Sequence[int], mesh: Mesh, placements: Sequence[Placement], world_ranks: np.ndarray
    ) -> None:
        self.world_ranks = world_ranks
        self.offsets = np.zeros((len(world_ranks), len(shape)), dtype=np.int64)
        self.sizes = np.tile(np.array(shape, dtype=np.int64), (len(world_ranks), 1))
        indices = np.unravel_index(world_ranks, [size for _, size in mesh.axes])
        for (_, num_ranks), index, placement in reversed(list(zip(mesh.axes, indices, placements, strict=True))):
            dim = sharded_dim(placement)
            if dim is not None:
                sizes = self.sizes[:, dim]
                full = -(-sizes // num_ranks)
                start = np.minimum(index * full, sizes)
                self.offsets[:, dim] += start
                self.sizes[:, dim] = np.minimum(full, sizes - start)

    def holders(self, region: Region) -> dict[Region, list[int]]:
        """The ranks' boxes that share an element with a region of the tensor, each with its world ranks, ascending."""
        starts = np.maximum(self.offsets, region.offsets)
        ends = np.minimum(self.offsets + self.sizes, region.ends)
        rows = (starts < ends).all(axis=1)
        columns = (column[rows].tolist() for column in (self.world_ranks, self.offsets, self.sizes))
        found: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
        for rank, offsets, sizes in zip(*columns, strict=True):
            found.setdefault((tuple(offsets), tuple(sizes)), []).append(rank)
        return {Region(*box): ranks for box, ranks in found.items()}


def ranks_at(mesh: Mesh, world_ranks: np.ndarray, coordinates: Sequence[tuple[int, ...] | None]) -> np.ndarray:
    """Select the ranks at some coordinates of a mesh.

    Args:
        mesh: all ranks.
        world_ranks: ``int64[n]``, the ranks to select from.
        coordinates: by mesh axis, outermost first, the indices to select; None: any.

    Returns:
        ``int64[m]``, the selected ranks, in the order of ``world_ranks``.
    """
    indices = np.unravel_index(world_ranks, [size for _, size in mesh.axes])
    inside = np.ones(len(world_ranks), dtype=bool)
    for index, selected in zip(indices, coordinates, strict=True):
        if selected is not None:
            inside &= np.isin(index, selected)
    return world_ranks[inside]
