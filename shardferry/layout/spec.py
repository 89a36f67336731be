"""Turn a mesh and placement rules, as people write them, into what each rank wants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

from shardferry.errors import LayoutError
from shardferry.layout.mesh import Mesh, Placement, Replicate
from shardferry.layout.tensor_layout import AxisCut, RankLayout, TensorLayout, replicated, sharded


@dataclass(frozen=True, slots=True)
class Rule:
    """Placements for the parameters whose FQN matches a shell glob; axes that aren't named replicate.

    With ``state``, a glob over state names, the rule is for those entries alone, whatever their shape.
    """

    match: str
    placements: Mapping[str, Placement]
    state: str | None = None


@dataclass(frozen=True, slots=True)
class HeldBy:
    """Parameters that only some coordinates of some axes have: the layers of a pipeline stage, the experts of a rank."""

    match: str  # shell glob over FQNs
    ranks: Mapping[str, tuple[int, ...]]  # axis: its coordinates


@dataclass(frozen=True)
class SpecLayout:
    """A target topology as people write it: a mesh, rules of which the first match wins, and a default."""

    mesh: Mesh
    rules: tuple[Rule, ...] = ()
    default: Mapping[str, Placement] | None = None
    held_by: tuple[HeldBy, ...] = ()

    def __post_init__(self) -> None:
        for where, axes in self._axes():
            for axis in axes:
                if axis not in self.mesh.names:
                    raise LayoutError(
                        f"{where}: axis {axis!r} is not in the mesh, which has {', '.join(self.mesh.names)}"
                    )
        sizes = dict(self.mesh.axes)
        for held in self.held_by:
            for axis, ranks in held.ranks.items():
                if not ranks or not all(0 <= rank < sizes[axis] for rank in ranks):
                    raise LayoutError(
                        f"held_by {held.match!r}: {axis}: {list(ranks)} are no coordinates of an axis of {sizes[axis]}; "
                        f"give some of 0 to {sizes[axis] - 1}"
                    )

    def _axes(self) -> list[tuple[str, Mapping[str, object]]]:
        rules = [(f"rule {rule.match!r}", rule.placements) for rule in self.rules]
        held = [(f"held_by {held.match!r}", held.ranks) for held in self.held_by]
        return [*rules, ("default", self.default or {}), *held]

    @property
    def world_size(self) -> int:
        return self.mesh.size

    def words(self) -> object:
        """All of it, in values that JSON takes."""
        default = None if self.default is None else _words(self.default)
        rules = [(rule.match, rule.state, _words(rule.placements)) for rule in self.rules]
        held_by = [(held.match, sorted(held.ranks.items())) for held in self.held_by]
        return [self.mesh.axes, rules, default, held_by]

    def rank(self, world_rank: int) -> RankLayout:
        """The layout as one rank sees it."""
        return _SpecRank(self, world_rank)

    def placements(self, fqn: str, state: str | None = None) -> tuple[Placement, ...] | None:
        """By mesh axis, outermost first. With a state name: of the rule for that entry, None where there is none."""
        if state is None:
            known = self._known_placements.get(fqn)
            if known is None:
                rule = next((rule for rule in self.rules if not rule.state and fnmatchcase(fqn, rule.match)), None)
                known = self._by_axis((self.default or {}) if rule is None else rule.placements)
                self._known_placements[fqn] = known
            return known
        for rule in self._entry_rules:
            if fnmatchcase(state, rule.state or "") and fnmatchcase(fqn, rule.match):
                return self._by_axis(rule.placements)
        return None

    @cached_property
    def _known_placements(self) -> dict[str, tuple[Placement, ...]]:
        """By FQN: each is looked up by every rank of a node for every entry of its state."""
        return {}

    @cached_property
    def _entry_rules(self) -> list[Rule]:
        return [rule for rule in self.rules if rule.state]

    def _by_axis(self, placements: Mapping[str, Placement]) -> tuple[Placement, ...]:
        return tuple(placements.get(axis, Replicate()) for axis in self.mesh.names)

    def kept_to(self, fqn: str) -> tuple[tuple[int, ...] | None, ...]:
        """By mesh axis, the coordinates that have anything of a parameter; None: all. The first match decides."""
        return tuple(
            next((h.ranks[axis] for h in self.held_by if axis in h.ranks and fnmatchcase(fqn, h.match)), None)
            for axis in self.mesh.names
        )

    def holds(self, fqn: str, coordinate: Sequence[int]) -> bool:
        """Whether the rank at a coordinate has anything of a parameter."""
        return all(kept is None or index in kept for kept, index in zip(self.kept_to(fqn), coordinate, strict=True))


def _words(placements: Mapping[str, Placement]) -> list[tuple[str, str]]:
    return sorted((axis, str(placement)) for axis, placement in placements.items())


@dataclass(frozen=True)
class _SpecRank:
    spec: SpecLayout
    world_rank: int

    @property
    def world_size(self) -> int:
        return self.spec.world_size

    @property
    def mesh(self) -> Mesh:
        return self.spec.mesh

    def fqns(self) -> None:
        return None

    def holds(self, fqn: str) -> bool:
        return not self.spec.held_by or self.spec.holds(fqn, self.mesh.coordinate(self.world_rank))

    def parameter_shape(self, fqn: str) -> None:
        return None

    def parameter(self, fqn: str, shape: tuple[int, ...]) -> TensorLayout:
        placements = self.spec.placements(fqn)
        assert placements is not None
        return self._cut(fqn, shape, placements)

    def entry(self, fqn: str, name: str, shape: tuple[int, ...]) -> TensorLayout | None:
        placements = self.spec.placements(fqn, name)
        return None if placements is None else self._cut(f"{fqn}: {name!r}", shape, placements)

    def dtype(self, fqn: str, name: str) -> None:
        return None

    def weights(self) -> None:
        return None

    def weight(self, fqn: str, shape: tuple[int, ...]) -> TensorLayout:
        return self.parameter(fqn, shape) if shape else replicated(shape, len(self.mesh.axes))

    def aliases(self, fqn: str) -> tuple[str, ...]:
        return ()

    def positions(self) -> None:
        return None

    def may_lack(self, fqn: str) -> bool:
        return False

    def _cut(self, where: str, shape: tuple[int, ...], placements: tuple[Placement, ...]) -> TensorLayout:
        layout = self._known_cuts.get((shape, placements))
        if layout is None:
            coordinate = self.mesh.coordinate(self.world_rank)
            cuts = [
                AxisCut(size, index, placement)
                for (_, size), index, placement in zip(self.mesh.axes, coordinate, placements, strict=True)
            ]
            try:
                layout = self._known_cuts[shape, placements] = sharded(shape, cuts)
            except LayoutError as error:
                raise LayoutError(f"{where}: {error}") from None
        return layout

    @cached_property
    def _known_cuts(self) -> dict[tuple[tuple[int, ...], tuple[Placement, ...]], TensorLayout]:
        """A model has a dozen shapes and placements, and thousands of tensors."""
        return {}
