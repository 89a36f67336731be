"""Start one loader per rank, ask them, and collect their handles. They are actors with names, so that any process can find them."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from shardferry.actors.fetch import Fetch
from shardferry.actors.guard import NAMESPACE, guard_name, loader_name, loaders_of
from shardferry.actors.loader import LoaderSettings
from shardferry.actors.loader_actor import LoaderActor
from shardferry.actors.logs import asked_format
from shardferry.actors.placement import Placement
from shardferry.actors.progress import Progress
from shardferry.handoff.handle import ShardHandle
from shardferry.handoff.object_store import ObjectStore, num_chunks
from shardferry.handoff.transport import Route
from shardferry.handoff.transports import transport_named
from shardferry.receiver import Reception
from shardferry.schemas.stage_config import StageConfig
from shardferry.schemas.stage_report import RankReport

PROGRESS = "progress"  # the concurrency group of Loader.progress
_PROGRESS_S = 0.5


@dataclass
class LoaderGroup:
    """The loaders of one stage. They live until nothing refers to them: neither this, nor a handle of their shards."""

    loaders: list[ActorHandle[Any]]
    settings: list[LoaderSettings]  # by rank
    joined: list[ray.ObjectRef[Any]]  # by rank: where it runs, once it has joined the process group


def start_loaders(
    config: StageConfig,
    stage: str,
    placement: Placement,
    own_group: PlacementGroup | None,
    receptions: Sequence[Reception],
) -> LoaderGroup:
    """Ask Ray to start the loaders, and return before they have started. Those of state that is kept outlive this process.

    Args:
        stage: the stage's name.
        own_group: the stage's own placement group, where `placement` needs one.
        receptions: of the trainers, by rank; empty without trainers.
    """
    one_node, keep = sum(node["Alive"] for node in ray.nodes()) == 1, config.handoff.keep
    settings = [
        LoaderSettings(
            stage=stage,
            log=asked_format(),
            world_rank=rank,
            world_size=placement.world_size,
            device=config.actors.device,
            transport=config.handoff.transport,
            one_node=one_node,
            trainer=receptions[rank].process if receptions else None,
            start_timeout_s=config.timeouts.start_s,
            load_timeout_s=config.timeouts.load_s,
            memory_fraction=1.0 if keep is None else keep.memory_fraction,
            guard=None if keep is None else guard_name(stage, keep.name),
        )
        for rank in range(placement.world_size)
    ]
    loaders = [_start(each, placement.options(each.world_rank, own_group)) for each in settings]
    rendezvous: Any = loaders[0].open_rendezvous.remote(uuid.uuid4().hex)
    return LoaderGroup(loaders, settings, [loader.join.remote(rendezvous) for loader in loaders])


def start_again(settings: LoaderSettings) -> ActorHandle[Any]:
    """Start a loader of kept state in the place of one that has died: on this node, where it takes no CPU and no GPU.

    Where another process has started it already, it is that one.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return _start(settings, {"num_cpus": 0, "num_gpus": 0, "scheduling_strategy": here, "get_if_exists": True})


def _start(settings: LoaderSettings, options: dict[str, Any]) -> ActorHandle[Any]:
    remote: Any = ray.remote  # the stubs of ray.remote lack concurrency_groups
    actor = remote(concurrency_groups={PROGRESS: 1})(LoaderActor)  # progress is answered while load runs
    handle: ActorHandle[Any] = actor.options(
        name=loader_name(settings.stage, settings.world_rank),
        lifetime=None if settings.guard is None else "detached",
        namespace=NAMESPACE,
        max_restarts=0,  # a restarted rank has no process group: the other ranks' collectives would hang
        max_task_retries=0,
        **options,
    ).remote(settings)
    return handle


def ask_for_handles(group: LoaderGroup, reports: Sequence[RankReport], *, exclusive: bool) -> list[ray.ObjectRef[Any]]:
    """The ObjectRef of each rank's handle, still without its loader and without bytes; see `completed`."""
    return [loader.handle.remote(report, exclusive) for loader, report in zip(group.loaders, reports, strict=True)]


def completed(handle: ShardHandle, loader: Any, node: str, timeout_s: float) -> ShardHandle:
    """A handle with what it needs to be opened in another process: its loader, or the bytes in Ray's object store.

    The calling process owns the bytes there: they outlive the loader.

    Args:
        node: the address of the loader's node.
        timeout_s: for one chunk of bytes to come from another node.
    """
    parts = [
        _completed(part, place, loader, Fetch(part.world_rank, timeout_s, node))
        for place, part in enumerate(handle.parts)
    ]
    return replace(parts[0], others=tuple(parts[1:]))


def _completed(part: ShardHandle, place: int, loader: Any, fetch: Fetch) -> ShardHandle:
    if not transport_named(part.transport).outlives_loader:
        route = Route(part.world_rank, fetch.node, fetch.timeout_s)
        return replace(part, source=part.source.along(route), held=loader)
    source = part.source
    assert isinstance(source, ObjectStore), "the object store alone outlives its loader"
    count = num_chunks(source.nbytes)
    refs = loader.chunks.options(num_returns=count).remote(place)
    chunks = (refs,) if count == 1 else tuple(refs)
    return replace(part, source=replace(source, chunks=chunks, fetch=fetch))


def ask_progress(stage: str, world_size: int) -> list[Progress]:
    """Every rank's progress, by rank; zeros for ranks that don't answer, as they haven't started or are gone."""
    asked: dict[Any, int] = {}
    with suppress(ray.exceptions.RayError):
        for name in loaders_of(stage):
            with suppress(ValueError):  # gone since
                loader: Any = ray.get_actor(name, NAMESPACE)
                rank = int(name.rpartition("rank")[2])
                asked[loader.progress.options(concurrency_group=PROGRESS).remote()] = rank
    answers = [Progress(0, 0)] * world_size
    ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_PROGRESS_S) if asked else ([], [])
    for ref in ready:
        with suppress(ray.exceptions.RayError):  # the driver's thread tells why the rank is gone
            answers[asked[ref]] = ray.get(ref)
    return answers
