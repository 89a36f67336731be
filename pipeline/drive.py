"""Carry out a submitted stage, in a thread of the submitting process: wait for what it needs, start loaders, load, promise kept."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle

from shardferry.actors.guard import KeptRecord, kill_loaders
from shardferry.actors.loader import Joined, Reread
from shardferry.actors.loader_group import (
    PROGRESS,
    LoaderGroup,
    ask_for_handles,
    ask_progress,
    completed,
    start_loaders,
)
from shardferry.actors.placement import Placement, UserBundles, check_room, free_places, place
from shardferry.actors.resident.digest import digest_of
from shardferry.actors.resident.kept import name_is_taken, others_of
from shardferry.actors.resident.memory_storage import RECORD, is_live
from shardferry.actors.sealed import Sealed
from shardferry.actors.whereabouts import node_of_this_process
from shardferry.checkpoint.catalog import Catalog
from shardferry.errors import RankError, SpecError
from shardferry.handoff.handle import ShardHandle
from shardferry.handoff.object_store import ObjectStore
from shardferry.handoff.transports import transport_named
from shardferry.layout.spec import SpecLayout
from shardferry.pipeline.cluster import reads_on_other_nodes
from shardferry.pipeline.preflight import check_checkpoint, check_topology, opened
from shardferry.pipeline.result import Outcome
from shardferry.pipeline.waiting import Wait, cause_of, dismiss, gather
from shardferry.plan.kept import index_of
from shardferry.receiver import Reception
from shardferry.schemas.stage_config import KeepSpec, StageConfig, TopologySpec
from shardferry.schemas.stage_report import RankReport

STARTED, OUTCOME = "started", "outcome"  # names of promises; a rank's handle has the rank as its name
Trainers = Sequence[ActorHandle[Any]]


@dataclass(frozen=True)
class Order:
    """A stage as it was submitted."""

    name: str
    config: StageConfig
    location: Any  # a path, a URL, an object that stands for a checkpoint, or an ObjectRef of one of these
    catalog: Catalog | None  # of a location that is known
    catalog_s: float  # seconds that it took to open and check it
    topology: SpecLayout | ray.ObjectRef[Any] | None  # None: the trainers'
    trainers: Trainers | None
    user: UserBundles | None
    exclusive: bool  # the trainers alone open the shards
    asks_trainers: bool = False  # whether the plan fits, before the read


@dataclass(frozen=True)
class Started:
    """Where the loaders of a stage run."""

    placement: Placement
    joined: Sequence[Joined]  # by rank
    seconds: float  # from the submission on, without the opening of the checkpoint


class Drive(threading.Thread):
    """The thread of one stage. It ends when the promises are kept, or when they are broken with the stage's error.

    Args:
        guard: holds the promises.
        refs: of the handles: one of them is ready early if it is cancelled.
    """

    def __init__(self, order: Order, guard: Any, refs: Sequence[ray.ObjectRef[Any]]) -> None:
        super().__init__(daemon=True, name=f"shardferry-{order.name}")
        self._order, self._guard = order, guard
        self._alarms: list[Any] = [guard.ended.remote(), *refs]
        self._submitted = time.time()
        self._catalog_s = order.catalog_s
        self._asked: list[Any] = []
        trainers = order.trainers or ()
        self._receptions: list[Any] = [
            t.shardferry_layout.remote(rank, len(trainers)) for rank, t in enumerate(trainers)
        ]
        self._nodes: list[Any] = [trainer.__ray_call__.remote(node_of_this_process) for trainer in trainers]

    def run(self) -> None:
        """Load, and keep or break the promises."""
        try:
            promised = self._load()
        except BaseException as error:
            kill_loaders(self._order.name)
            self._guard.fail.remote(cause_of(error))
            dismiss(self._asked)
        else:
            self._guard.fulfil.remote(promised, is_last=True)
        finally:
            self._alarms, self._asked = [], []  # a ref keeps its loader alive

    def _load(self) -> dict[Any, Sealed]:
        """The handles by rank, and the outcome. Raises ShardferryError."""
        order, timeouts = self._order, self._order.config.timeouts
        topology, found = self._topology(), self._catalog()
        receptions = self._gather(self._receptions, "asking the trainers for their layout", "start_s", who="trainer")
        nodes = self._gather(self._nodes, "asking the trainers for their node", "start_s", who="trainer")
        if topology is None or self._order.catalog is None:
            check_load(order.config, found, receptions if topology is None else topology)
        catalog = ray.put(found)
        world_size = len(receptions) if topology is None else topology.world_size
        placement = place(order.config, world_size, trainer_nodes=nodes or None, user=order.user)
        group, started = self._start(placement, receptions)
        self._guard.fulfil.remote({STARTED: Sealed.of(started)})
        places = [joined.ip for joined in started.joined]
        reports = self._read(group, catalog, topology, receptions, places)
        if (keep := order.config.handoff.keep) is not None:
            targets = receptions if topology is None else [topology] * world_size
            self._keep(keep, group, found, reports, targets)
        handles = self._gather(
            ask_for_handles(group, reports, exclusive=order.exclusive),
            "making the shards' handles",
            "handoff_s",
            places=places,
        )
        handles = [
            completed(handle, loader, joined.ip, timeouts.handoff_s)
            for handle, loader, joined in zip(handles, group.loaders, started.joined, strict=True)
        ]
        if keep is None and all(transport_named(report.transport).outlives_loader for report in reports):
            self._wait_for_bytes(handles)
            kill_loaders(order.name)  # the shards don't need them any more: the GPUs are free for other work
        phases = {"catalog": self._catalog_s, "start": started.seconds}
        outcome = Outcome(phases, catalog, self._receptions if topology is None else topology, reports)
        return {OUTCOME: Sealed.of(outcome), **{rank: Sealed.of(handle) for rank, handle in enumerate(handles)}}

    def _topology(self) -> SpecLayout | None:
        given = self._order.topology
        if not isinstance(given, ray.ObjectRef):
            return given
        (found,) = self._gather([given], "waiting for the topology", "load_s", who="upstream task")
        return as_layout(found)

    def _catalog(self) -> Catalog:
        if self._order.catalog is not None:
            return self._order.catalog
        location = self._order.location
        if not isinstance(location, ray.ObjectRef):
            return self._opened(location)
        (location,) = self._gather([location], "waiting for the checkpoint's location", "load_s", who="upstream task")
        return self._opened(location)

    def _opened(self, location: Any) -> Catalog:
        start = time.time()
        catalog = opened(self._order.config, location)
        self._catalog_s = time.time() - start
        self._submitted += self._catalog_s  # it doesn't count to the start
        return catalog

    def _start(self, placement: Placement, receptions: Sequence[Reception]) -> tuple[LoaderGroup, Started]:
        order = self._order
        check_room(order.config, placement)
        own = None
        if bundles := placement.own_bundles:
            reserved: Any = self._guard.reserve.remote(bundles, placement.strategy, placement.label_selectors())
            (own,) = self._gather(
                [reserved], "reserving the loaders' places", "start_s", hint=lambda _: free_places(placement)
            )
        group = start_loaders(order.config, order.name, placement, own, receptions)
        joined = self._gather(
            group.joined, "starting the loaders", "start_s", hint=lambda ranks: free_places(placement)
        )
        return group, Started(placement, joined, time.time() - self._submitted)

    def _read(
        self,
        group: LoaderGroup,
        catalog: ray.ObjectRef[Any],
        topology: SpecLayout | None,
        receptions: Sequence[Reception],
        places: Sequence[str],
    ) -> list[RankReport]:
        order = self._order
        requests, read = order.config.checkpoint.requests(), order.config.read.options(order.config.timeouts.load_s)
        target = None if topology is None else ray.put(topology)
        trainers = order.trainers if order.asks_trainers else None
        reports = [
            loader.load.remote(
                catalog,
                target or self._receptions[rank],
                requests,
                read,
                trainers[rank] if trainers and receptions[rank].in_steps else None,
            )
            for rank, loader in enumerate(group.loaders)
        ]
        begun = time.monotonic()
        return self._gather(
            reports,
            "loading",
            "load_s",
            hint=lambda ranks: _stalled(order.name, group, ranks, time.monotonic() - begun),
            places=places,
        )

    def _keep(
        self,
        keep: KeepSpec,
        group: LoaderGroup,
        catalog: Catalog,
        reports: Sequence[RankReport],
        targets: Sequence[SpecLayout | Reception],
    ) -> None:
        """Let the loaders live without this process, and give the guard the index of what they hold. Raises ShardferryError."""
        config, loaders = self._order.config, group.loaders
        joined = self._gather(group.joined, "keeping the loaded state", "handoff_s")
        self._gather([loader.keep.remote() for loader in loaders], "keeping the loaded state", "handoff_s")
        manifests = self._gather([loader.manifests.remote() for loader in loaders], "listing what is kept", "handoff_s")
        (step,) = self._gather([loaders[0].step.remote()], "listing what is kept", "handoff_s")
        digest, retries = digest_of(catalog), 0 if is_live(catalog.storage_options) else config.handoff.retries
        taken = others_of(keep.name, self._order.name)
        if taken and not keep.replace:
            raise name_is_taken(keep.name)
        record = KeptRecord(
            name=keep.name,
            stage=self._order.name,
            ttl_s=keep.ttl_s,
            location=catalog.location,
            optimizer_key=config.checkpoint.optimizer_key,
            topology=_topology_words(self._order, len(loaders)),
            nodes=[there.ip for there in joined],
            nbytes=[report.arena_bytes for report in reports],
            files=index_of(manifests).files(),
            digest=digest,
            model_key=config.checkpoint.model_key,
            selection=config.checkpoint.model_dump(include={"rename", "include", "exclude"}, exclude_defaults=True),
            step=step,
            start_s=config.timeouts.start_s,
            retries=retries,
            rereads=self._rereads(group, catalog, digest, targets) if retries else (),
        )
        self._gather([self._guard.keep.remote(record)], "keeping the loaded state", "handoff_s", who="guard")
        for other in taken:
            dismiss([other.drop.remote()])

    def _rereads(
        self, group: LoaderGroup, catalog: Catalog, digest: str, targets: Sequence[SpecLayout | Reception]
    ) -> list[Sealed]:
        """By rank: what another loader needs in the place of one that dies later."""
        config = self._order.config
        return [
            Sealed.of(
                Reread(
                    settings=settings,
                    location=catalog.location,
                    storage_options={
                        name: option for name, option in catalog.storage_options.items() if name != RECORD
                    },
                    cache=config.checkpoint.cache,
                    digest=digest,
                    target=target,
                    requests=config.checkpoint.requests(),
                    read=config.read.options(config.timeouts.load_s),
                )
            )
            for settings, target in zip(group.settings, targets, strict=True)
        ]

    def _wait_for_bytes(self, handles: Sequence[ShardHandle]) -> None:
        """Until the object store has all shards. Raises RankError."""
        rank_of = {
            chunk: rank
            for rank, handle in enumerate(handles)
            for part in handle.parts
            if isinstance(part.source, ObjectStore)
            for chunk in part.source.chunks
        }
        timeout_s = self._order.config.timeouts.handoff_s
        _, late = ray.wait(list(rank_of), num_returns=len(rank_of), timeout=timeout_s, fetch_local=False)
        if late:
            ranks = sorted({rank_of[chunk] for chunk in late})
            raise RankError(
                f"copying to the object store: {len(ranks)} of {len(handles)} ranks were not done within timeouts.handoff_s = "
                f"{timeout_s:g} s",
                ranks,
            )

    def _gather(
        self,
        refs: Sequence[ray.ObjectRef[Any]],
        doing: str,
        setting: str,
        *,
        who: str = "loader",
        hint: Callable[[Sequence[int]], str] | None = None,
        places: Sequence[str] = (),
    ) -> list[Any]:
        wait = Wait(
            doing,
            getattr(self._order.config.timeouts, setting),
            f"timeouts.{setting}",
            who,
            hint or (lambda ranks: _busy(who)),
            places,
            self._alarms,
        )
        self._asked += refs
        return gather(refs, wait)


def _topology_words(order: Order, world_size: int) -> str:
    if isinstance(order.topology, SpecLayout):
        return str(order.topology.mesh)
    return f"{world_size} trainers" if order.trainers is not None else f"{world_size} ranks"


def _busy(who: str) -> str:
    if who != "trainer":
        return ""
    return "; a trainer that is busy in another method answers after it: call the stage before, or give its class max_concurrency=2"


def _stalled(stage: str, group: LoaderGroup, ranks: Sequence[int], seconds: float) -> str:
    """Which of the late ranks have not moved, how far all are, and where the first one stands."""
    before = ask_progress(stage, len(group.loaders))
    time.sleep(1.0)
    now = ask_progress(stage, len(group.loaders))
    done, total = sum(p.bytes_done for p in now), sum(p.bytes_total for p in now)
    still = [rank for rank in ranks if now[rank].bytes_done == before[rank].bytes_done]
    told = (
        f"; {done} of {total} bytes were read, {done / seconds / 1e6:.1f} MB/s"
        if total
        else "; nothing was planned yet"
    )
    if not still:
        return f"{told}; all late ranks still read: set timeouts.load_s higher"
    loader: Any = group.loaders[still[0]]
    try:
        stack = ray.get(loader.stack.options(concurrency_group=PROGRESS).remote(), timeout=2.0)
    except (ray.exceptions.RayError, TimeoutError):
        stack = "it does not answer: its process is stopped or its node is not reachable"
    return f"{told}; no byte moved on rank {', '.join(map(str, still[:8]))}; rank {still[0]} stands in: {stack}"


def as_layout(topology: Any) -> SpecLayout:
    """A topology as an upstream task may give it: a `TopologySpec`, or its fields.

    Raises:
        SpecError: it is something else, or wrong.
    """
    if isinstance(topology, TopologySpec):
        return topology.layout()
    if not isinstance(topology, dict):
        raise SpecError(f"topology: is a {type(topology).__name__}; give a TopologySpec, or a dict of its fields")
    config = StageConfig.from_values({"topology": topology}, source="topology")
    assert config.topology is not None
    return config.topology.layout()


def check_load(config: StageConfig, catalog: Catalog, target: SpecLayout | Sequence[Reception]) -> None:
    """Refuse what can't be loaded.

    Args:
        target: the topology, or what each trainer wants.

    Raises:
        PlanError: nothing is saved under a key; or a hole or an overlap in the optimizer's state.
        LayoutError: a placement that a tensor can't have.
        StorageError: a file is missing or short.
    """
    requests, on_other_nodes = config.checkpoint.requests(), reads_on_other_nodes(config)
    if isinstance(target, SpecLayout):
        check_checkpoint(catalog, requests.request, on_other_nodes=on_other_nodes)
        check_topology(catalog, target, requests.request)
        return
    for part in target[0].parts:
        request = requests.of(part.optimizer_key, with_weights=part.with_weights)
        check_checkpoint(catalog, request, on_other_nodes=on_other_nodes)
