"""Where the loaders of a stage run, and what each one takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, get_current_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from shardferry.errors import SpecError
from shardferry.schemas.stage_config import ActorsSpec, StageConfig

_NEXT_TO_NOTHING = 0.001  # CPUs: a bundle can't be empty


@dataclass(frozen=True)
class UserBundles:
    """A placement group that the user has made, for the loaders.

    Args:
        group: with room for them.
        bundles: the index of each rank's bundle; None: Ray finds one with room.
    """

    group: PlacementGroup
    bundles: Sequence[int] | None = None
    is_captured: bool = False  # the caller's own group: others run in its bundles, and it isn't known what they leave


def captured_group() -> UserBundles | None:
    """The placement group of the calling task or actor, where it captures what that starts (Ray Train, Ray Tune)."""
    group = get_current_placement_group()
    if group is None or not ray.get_runtime_context().should_capture_child_tasks_in_placement_group:
        return None
    return UserBundles(group, is_captured=True)


@dataclass(frozen=True)
class Placement:
    """Where the loaders run.

    Exactly one of `nodes` and `group` is set, or none: then the stage needs a placement group of its own, see `own_bundles`.
    """

    world_size: int
    num_cpus: float  # of each loader
    num_gpus: float
    label_selector: Mapping[str, str]
    strategy: str = "PACK"  # of a placement group of the stage's own
    nodes: Sequence[str] | None = None  # Ray's id of each rank's node: beside the trainers
    group: PlacementGroup | None = None
    bundles: Sequence[int] | None = None  # of `group`, by rank; None: any

    @property
    def resources(self) -> dict[str, float]:
        """Ray's resources of one loader: name to amount."""
        bundle = {"CPU": self.num_cpus, "GPU": self.num_gpus}
        return {name: amount for name, amount in bundle.items() if amount > 0} or {"CPU": _NEXT_TO_NOTHING}

    @property
    def own_bundles(self) -> list[dict[str, float]]:
        """The bundles of a placement group of the stage's own; none where it needs none."""
        return [self.resources] * self.world_size if self.nodes is None and self.group is None else []

    def label_selectors(self) -> list[dict[str, str]] | None:
        """Of `own_bundles`."""
        return [dict(self.label_selector)] * self.world_size if self.label_selector else None

    def options(self, rank: int, own: PlacementGroup | None) -> dict[str, Any]:
        """Ray's options of a rank's actor.

        Args:
            own: the stage's own placement group, if it has one.
        """
        options: dict[str, Any] = {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus}
        if self.nodes is not None:
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(self.nodes[rank], soft=False)
        elif (group := self.group or own) is not None:
            bundles = self.bundles if self.group is not None else range(self.world_size)
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=-1 if bundles is None else bundles[rank]
            )
        if self.label_selector and own is None:
            options["label_selector"] = dict(self.label_selector)
        return options

    def beside(self, rank: int, node: str) -> Any:
        """The scheduling strategy of an actor that is to run where a rank's loader runs.

        Args:
            node: Ray's id of the loader's node.
        """
        if self.group is not None and self.bundles is not None:
            return PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=self.bundles[rank])
        return NodeAffinitySchedulingStrategy(node, soft=False)


def place(
    config: StageConfig, world_size: int, *, trainer_nodes: Sequence[str] | None, user: UserBundles | None
) -> Placement:
    """Decide where the loaders run.

    In the user's placement group, if one is given. Else beside the trainers, where there are some; else in the placement group
    that captures what the caller starts; else in a group of the stage's own. What a spec says comes before `auto`.

    Args:
        trainer_nodes: Ray's id of each trainer's node; None: there are no trainers.
        user: the placement group that the user has given, or that captures.

    Raises:
        SpecError: the user's placement group has too few bundles.
    """
    spec, has_trainers = config.actors, trainer_nodes is not None
    given = user if user is not None and not (user.is_captured and (has_trainers or spec.placement != "auto")) else None
    offered = _offered(given, world_size) if given is not None and not given.is_captured else {}
    keeps_on_host = (
        config.handoff.keep is not None
    )  # state that is kept must not take GPUs from those who train with it
    otherwise = 0.0 if has_trainers or given is not None or keeps_on_host else 1.0
    return Placement(
        world_size,
        num_cpus=_amount(spec.cpus_per_actor, offered.get("CPU", otherwise)),
        num_gpus=_amount(spec.gpus_per_actor, offered.get("GPU", otherwise)),
        label_selector=spec.label_selector,
        strategy="PACK" if spec.placement == "auto" else spec.placement,
        nodes=trainer_nodes if spec.placement == "auto" and given is None else None,
        group=None if given is None else given.group,
        bundles=None if given is None else given.bundles,
    )


def _amount(asked: float | str, otherwise: float) -> float:
    return min(otherwise, 1.0) if isinstance(asked, str) else asked


def _offered(user: UserBundles, world_size: int) -> dict[str, float]:
    """What each rank's bundle has of each resource, the least of all. Raises SpecError."""
    specs = user.group.bundle_specs
    if user.bundles is None:
        return {name: min(bundle.get(name, 0.0) for bundle in specs) for bundle in specs for name in bundle}
    if len(user.bundles) != world_size or not all(0 <= index < len(specs) for index in user.bundles):
        raise SpecError(
            f"bundles: {list(user.bundles)} for {world_size} ranks, of a placement group of {len(specs)} bundles; give the index of "
            "one bundle for each rank"
        )
    chosen = [specs[index] for index in user.bundles]
    return {name: min(bundle.get(name, 0.0) for bundle in chosen) for bundle in chosen for name in bundle}


def num_places(free: Sequence[Mapping[str, float]], need: Mapping[str, float], strategy: str) -> int:
    """How many equal bundles nodes have room for under a strategy of Ray's placement groups.

    Args:
        free: each node's resources.
        need: one bundle's.
    """
    room = [min(int(node.get(name, 0.0) / amount + 1e-9) for name, amount in need.items()) for node in free]
    if strategy == "STRICT_PACK":
        return max(room, default=0)
    return sum(map(bool, room)) if strategy == "STRICT_SPREAD" else sum(room)


def check_room(config: StageConfig, placement: Placement) -> None:
    """Check that the cluster's nodes can hold all loaders at once. Ray itself would wait without end.

    Raises:
        SpecError: they can't, whatever else ends, and the spec doesn't ask for autoscaling.
    """
    if config.actors.autoscaling or not placement.own_bundles:
        return
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    found = num_places(nodes, placement.resources, placement.strategy)
    if found < placement.world_size:
        raise SpecError(_no_room(config.actors, placement, found, nodes))


def _no_room(spec: ActorsSpec, placement: Placement, found: int, nodes: Sequence[Mapping[str, float]]) -> str:
    total = {name: sum(node.get(name, 0.0) for node in nodes) for name in placement.resources}
    short = [name for name, amount in placement.resources.items() if amount * placement.world_size > total[name]]
    needs = ", ".join(f"{placement.world_size * placement.resources[n]:g} {n}s" for n in short)
    has = ", ".join(f"{total[n]:g}" for n in short)
    what = (
        f"actors.{short[0].lower()}s_per_actor: {placement.world_size} ranks need {needs}, the cluster has {has}"
        if short
        else f"actors.placement: {placement.strategy} has places for {found} of {placement.world_size} ranks; each needs "
        f"{_amounts(placement.resources)}, the nodes have {'; '.join(map(_amounts, nodes))}"
    )
    ways = ["use a smaller mesh"]
    if short:
        zero = " (0 loads on CPUs)" if short[0] == "GPU" else ""
        ways.append(f"set actors.{short[0].lower()}s_per_actor lower{zero}")
    else:
        ways.append("set actors.placement: PACK")
    return f"{what}; {', '.join(ways)}, or actors.autoscaling: true"


def free_places(placement: Placement) -> str:
    """What each node has free, and what could be changed; the end of an error about loaders that don't start."""
    free = ray._private.state.available_resources_per_node()
    names = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    nodes = "; ".join(
        f"{names[node]} has {_amounts(resources)} free" for node, resources in free.items() if node in names
    )
    where = (
        f"actors.placement: {placement.strategy}" if placement.own_bundles else "beside its trainer or in its bundle"
    )
    return (
        f"; each rank needs {_amounts(placement.resources)} ({where}); {nodes}. End what holds them, set actors.gpus_per_actor or "
        "actors.cpus_per_actor lower, or give trainers: loaders beside them take none"
    )


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in ("GPU", "CPU"))
