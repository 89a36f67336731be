"""Start one loader a rank, each pinned to its bundle of a placement group, and take them all down together."""

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
    """The loaders of one stage. Picklable; only its maker takes it down when it is forgotten."""

    loaders: list[ActorHandle[Any]]
    bundles: PlacementGroup
    joined: list[ray.ObjectRef[Any]]  # by rank: the process's id, once it is in the process group

    @property
    def world_size(self) -> int:
        return len(self.loaders)

    def ask_progress(self) -> list[ray.ObjectRef[Any]]:
        """Every rank's progress, by rank, as Ray's promises."""
        return [loader.progress.options(concurrency_group=PROGRESS).remote() for loader in self.loaders]

    def take_down(self) -> None:
        """Kill the loaders and give their bundles back. Arenas that trainers have mapped live on."""
        if not ray.is_initialized():
            return
        for loader in self.loaders:
            with suppress(ray.exceptions.RayError, ValueError):  # dead already
                ray.kill(loader, no_restart=True)
        with suppress(ray.exceptions.RayError, ValueError):
            remove_placement_group(self.bundles)


def start_loaders(config: StageConfig, world_size: int) -> LoaderGroup:
    """Ask Ray for the loaders; returns at once, nothing has started yet.

    Raises:
        SpecError: the cluster hasn't enough GPUs or CPUs.
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
    meeting: Any = loaders[0].open_meeting.remote(uuid.uuid4().hex)
    joined = [loader.join.remote(meeting) for loader in loaders]
    return LoaderGroup(loaders, bundles, joined)


def bundle_of(config: StageConfig) -> dict[str, float]:
    """Resources of one rank."""
    bundle = {"CPU": config.actors.cpus_per_actor, "GPU": config.actors.gpus_per_actor}
    return {name: amount for name, amount in bundle.items() if amount > 0} or {"CPU": 0.001}


def check_resources(config: StageConfig, world_size: int) -> None:
    """Refuse what the cluster can't hold: Ray itself would wait for ever. Raises SpecError with both numbers."""
    if config.actors.autoscaling:
        return
    there = ray.cluster_resources()
    for name, field in (("GPU", "gpus_per_actor"), ("CPU", "cpus_per_actor")):
        wanted, found = bundle_of(config).get(name, 0) * world_size, there.get(name, 0)
        if wanted > found:
            raise SpecError(
                f"actors.{field}: {world_size} ranks need {wanted:g} {name}s, the cluster has {found:g}; use a smaller mesh, "
                f"set actors.{field} lower"
                + (" (0 loads on CPUs)" if name == "GPU" else "")
                + ", or actors.autoscaling: true"
            )


def _remote_loader(config: StageConfig, bundles: PlacementGroup, settings: LoaderSettings) -> ActorHandle[Any]:
    bundle = bundle_of(config)
    remote: Any = ray.remote  # its stubs lack concurrency_groups
    actor = remote(concurrency_groups={PROGRESS: 1})(Loader)  # progress answers beside the work
    handle: ActorHandle[Any] = actor.options(
        num_cpus=bundle.get("CPU", 0),
        num_gpus=bundle.get("GPU", 0),
        scheduling_strategy=PlacementGroupSchedulingStrategy(bundles, placement_group_bundle_index=settings.world_rank),
        max_restarts=0,  # a lone restarted rank would hang the others' collectives
        max_task_retries=0,
    ).remote(settings)
    return handle
