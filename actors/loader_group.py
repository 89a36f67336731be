"""Start one loader per rank, each in its own bundle of a placement group, and take them all down together."""

from __future__ import annotations

import uuid
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from shardferry.actors.loader import Loader, LoaderSettings
from shardferry.errors import SpecError
from shardferry.schemas.stage_config import StageConfig

PROGRESS = "progress"  # the concurrency group of Loader.progress


@dataclass
class LoaderGroup:
    """The loaders of one stage. Picklable. Deleting a copy doesn't take the loaders down."""

    loaders: list[ActorHandle[Any]]
    bundles: PlacementGroup
    joined: list[ray.ObjectRef[Any]]  # by rank: the id of its process, once it has joined the process group

    @property
    def world_size(self) -> int:
        """Number of loaders."""
        return len(self.loaders)

    def ask_progress(self) -> list[ray.ObjectRef[Any]]:
        """An ObjectRef of each rank's `Progress`, by rank."""
        return [loader.progress.options(concurrency_group=PROGRESS).remote() for loader in self.loaders]

    def take_down(self) -> None:
        """Kill the loaders and remove their placement group. Arenas that trainers have mapped stay valid."""
        if not ray.is_initialized():
            return
        for loader in self.loaders:
            with suppress(ray.exceptions.RayError, ValueError):  # dead already
                ray.kill(loader, no_restart=True)
        with suppress(ray.exceptions.RayError, ValueError):
            remove_placement_group(self.bundles)


def start_loaders(config: StageConfig, world_size: int) -> LoaderGroup:
    """Ask Ray to start the loaders, and return before they have started.

    Raises:
        SpecError: the cluster has fewer GPUs or CPUs than the ranks need.
    """
    bundle = bundle_of(config)
    check_resources(config, world_size)
    bundles = placement_group([bundle] * world_size, strategy=config.actors.placement)
    one_node = sum(node["Alive"] for node in ray.nodes()) == 1
    loaders = [
        _remote_loader(
            config,
            bundles,
            LoaderSettings(
                world_rank=rank,
                world_size=world_size,
                device=config.actors.device,
                transport=config.handoff.transport,
                one_node=one_node,
                start_timeout_s=config.timeouts.start_s,
                load_timeout_s=config.timeouts.load_s,
            ),
        )
        for rank in range(world_size)
    ]
    rendezvous: Any = loaders[0].open_rendezvous.remote(uuid.uuid4().hex)
    joined = [loader.join.remote(rendezvous) for loader in loaders]
    return LoaderGroup(loaders, bundles, joined)


def bundle_of(config: StageConfig) -> dict[str, float]:
    """Ray's resources of one rank: name to amount."""
    bundle = {"CPU": config.actors.cpus_per_actor, "GPU": config.actors.gpus_per_actor}
    return {name: amount for name, amount in bundle.items() if amount > 0} or {"CPU": 0.001}


def check_resources(config: StageConfig, world_size: int) -> None:
    """Check that the cluster has room for all ranks. Ray itself would wait without end.

    Raises:
        SpecError: it has fewer GPUs or CPUs than the ranks need, and the spec doesn't ask for autoscaling.
    """
    if config.actors.autoscaling:
        return
    available = ray.cluster_resources()
    for name, field in (("GPU", "gpus_per_actor"), ("CPU", "cpus_per_actor")):
        needed, found = bundle_of(config).get(name, 0) * world_size, available.get(name, 0)
        if needed > found:
            raise SpecError(
                f"actors.{field}: {world_size} ranks need {needed:g} {name}s, the cluster has {found:g}; use a smaller mesh, "
                f"set actors.{field} lower"
                + (" (0 loads on CPUs)" if name == "GPU" else "")
                + ", or actors.autoscaling: true"
            )


def _remote_loader(config: StageConfig, bundles: PlacementGroup, settings: LoaderSettings) -> ActorHandle[Any]:
    bundle = bundle_of(config)
    remote: Any = ray.remote  # the stubs of ray.remote lack concurrency_groups
    actor = remote(concurrency_groups={PROGRESS: 1})(Loader)  # progress is answered while load runs
    handle: ActorHandle[Any] = actor.options(
        num_cpus=bundle.get("CPU", 0),
        num_gpus=bundle.get("GPU", 0),
        scheduling_strategy=PlacementGroupSchedulingStrategy(bundles, placement_group_bundle_index=settings.world_rank),
        max_restarts=0,  # a restarted rank has no process group: the other ranks' collectives would hang
        max_task_retries=0,
    ).remote(settings)
    return handle
