"""The guard of a stage: a small actor that holds what the stage has reserved, and the handles that its refs promise.

A stage's ObjectRefs exist before its loaders do: before the location, the topology or the trainers' nodes are known. They are
results of the guard's method `Guard.promise`, which returns once the shards are loaded. The guard imports no torch.

It is detached, as Ray frees the placement group of a detached actor when that actor ends, and no other one before the
end of the job. So it has to end by itself: when the process that submitted the stage has died, also before the guard knew of
it, and when all loaders are gone.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.actor import exit_actor
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from shardferry.actors.sealed import Sealed
from shardferry.errors import LoadCancelled

NAMESPACE = "shardferry"  # of the guards and the loaders
_POLL_S = 0.5
_EXIT_S = 10.0
_WATCHED_S = 60.0  # from the start until `Guard.watch` is called: the submitting process asks for both at once
_MAX_WAITING = 1 << 20  # calls that wait at the same time: one for each rank, and some


def loader_name(stage: str, rank: int) -> str:
    """The name of a loader's actor."""
    return f"shardferry:{stage}:rank{rank}"


def guard_name(stage: str, kept: str | None) -> str:
    """The name of a stage's guard.

    Args:
        kept: the name under which the loaded state is kept.
    """
    return f"shardferry:{stage}" if kept is None else f"{kept_prefix(kept)}{stage}"


def kept_prefix(name: str | None) -> str:
    """How the names of the guards of kept state begin: under one name, or under any."""
    return "shardferry:kept:" if name is None else f"shardferry:kept:{name}:"


@dataclass
class KeptRecord:
    """What is kept under a name, and where."""

    name: str
    stage: str
    ttl_s: float  # it is dropped if nobody attaches in this time
    location: str  # of the checkpoint
    optimizer_key: str | None
    topology: str  # in words
    nodes: list[str]  # address, by rank
    nbytes: Sequence[int]  # of the arenas, by rank
    files: Mapping[str, bytes] = field(repr=False)  # see `shardferry.checkpoint.kept`
    holders: Sequence[Any] | None = None  # handles of live trainers that hold the arenas; None: the stage's loaders do
    digest: str = ""  # of the checkpoint, see `shardferry.actors.resident.digest`
    model_key: str | Mapping[str, str] | None = None
    selection: Mapping[str, Any] = field(default_factory=dict)  # rename, include and exclude, where the spec has them
    step: float | None = None  # of the optimizer; None: its state doesn't tell
    start_s: float = 120.0  # deadline for a loader to start and to answer
    retries: int = 0  # how often an attach reads a lost rank's part again
    rereads: Sequence[Sealed] = field(default=(), repr=False)  # by rank: a `shardferry.actors.loader.Reread`
    created: float = 0.0  # seconds since the epoch
    used: float = 0.0  # when somebody attached last

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.nodes)


def loaders_of(stage: str) -> list[str]:
    """The names of a stage's living loaders."""
    named = ray.util.list_named_actors(all_namespaces=True)
    prefix = loader_name(stage, 0).removesuffix("0")
    return [actor["name"] for actor in named if actor["namespace"] == NAMESPACE and actor["name"].startswith(prefix)]


def kill_loaders(stage: str) -> None:
    """Kill the loaders of a stage. Arenas that trainers have mapped stay valid."""
    if not ray.is_initialized():
        return
    with suppress(ray.exceptions.RayError):
        for name in loaders_of(stage):
            with suppress(ValueError):  # gone since
                ray.kill(ray.get_actor(name, NAMESPACE))


class Guard:
    """Holds one stage's placement group and promises. All methods may wait at the same time.

    Args:
        stage: its name.
        watched_s: deadline for the first call of `watch`.
    """

    def __init__(self, stage: str, watched_s: float = _WATCHED_S) -> None:
        self._stage = stage
        self._unwatched = threading.Timer(watched_s, self._end)
        self._unwatched.daemon = True
        self._unwatched.start()
        self._ended, self._never, self._news = asyncio.Event(), asyncio.Event(), asyncio.Condition()
        self._is_done = False
        self._promised: dict[Hashable, Sealed] = {}
        self._error: Exception | None = None
        self._record: KeptRecord | None = None

    async def promise(self, name: Hashable) -> Any:
        """What the stage will give under a name: a rank's handle, say. To be asked for once.

        Cancelling the call cancels the stage.

        Raises:
            ShardferryError: the stage has failed.
        """
        try:
            async with self._news:
                await self._news.wait_for(lambda: name in self._promised or self._error is not None)
        except asyncio.CancelledError:
            await self.cancel()
            raise
        if self._error is not None:
            raise self._error
        return self._promised.pop(name).opened_on_arrival()  # to keep it here would keep its loader alive

    async def fulfil(self, promised: Mapping[Hashable, Sealed], *, is_last: bool = False) -> None:
        """Give what was promised, by name.

        Args:
            is_last: all shards are loaded.
        """
        async with self._news:
            self._promised.update(promised if self._error is None else {})
            self._is_done |= is_last
            self._news.notify_all()

    async def fail(self, error: Exception) -> None:
        """End the stage with an error. The first one counts; once all shards are loaded, this gives back what is reserved."""
        async with self._news:
            if self._record is not None:
                return
            if self._is_done:
                self._leave()
            self._error, self._is_done = error, True
            self._ended.set()
            self._news.notify_all()

    async def keep(self, record: KeptRecord) -> None:
        """Keep what is loaded, also after the submitting process has ended."""
        record.created = record.used = time.time()
        self._record = record

    async def record(self) -> KeptRecord | None:
        """What is kept, without what is large: `files` and `reread` have that. None before it is complete."""
        return None if self._record is None else replace(self._record, files={}, rereads=())

    async def files(self) -> Mapping[str, bytes]:
        """Of the record."""
        assert self._record is not None
        return self._record.files

    async def reread(self, rank: int) -> Any:
        """What another loader needs to read a rank's part again."""
        assert self._record is not None
        return self._record.rereads[rank].opened_on_arrival()

    async def moved(self, rank: int, node: str) -> None:
        """Another loader has a rank's part now.

        Args:
            node: its address.
        """
        if self._record is not None:
            self._record.nodes[rank] = node

    async def touch(self) -> None:
        """Somebody attaches: the time to live begins again."""
        if self._record is not None:
            self._record.used = time.time()

    async def drop(self) -> None:
        """Give back what is kept, and end: Ray then removes the placement group, and what is left in it."""
        await asyncio.get_running_loop().run_in_executor(None, kill_loaders, self._stage)
        self._leave()

    def _leave(self) -> None:
        """End this actor. Ray lets the calls that wait return first."""
        self._never.set()
        self._ended.set()
        exit_actor()

    def _end(self) -> None:
        """From a thread: end as an actor ends on purpose, or Ray tells every driver that a worker has died."""
        this: Any = ray.get_runtime_context().current_actor
        this.drop.remote()
        time.sleep(_EXIT_S)
        os._exit(0)

    async def cancel(self) -> None:
        """End the stage, if it is not done, and kill its loaders."""
        await self.fail(LoadCancelled("the load was cancelled"))
        await asyncio.get_running_loop().run_in_executor(None, kill_loaders, self._stage)

    async def ended(self) -> None:
        """Return when the stage was cancelled or has failed."""
        await self._ended.wait()

    async def never(self) -> None:
        """Don't return. Whoever calls this owns the result, and the result fails when its owner dies."""
        await self._never.wait()

    async def reserve(
        self, bundles: Sequence[dict[str, float]], strategy: str, label_selectors: Sequence[dict[str, str]] | None
    ) -> PlacementGroup:
        """Create the stage's placement group, and return before it is placed."""
        selectors: Any = None if label_selectors is None else list(label_selectors)
        found: PlacementGroup = placement_group(list(bundles), strategy=strategy, bundle_label_selector=selectors)
        return found

    async def watch(self, never: Sequence[ray.ObjectRef[Any]]) -> None:
        """End this process when the owner of `never` dies, and when the stage is over and has no loaders left."""
        self._unwatched.cancel()
        threading.Thread(target=self._watch, args=(list(never),), daemon=True, name="shardferry-guard").start()

    def _watch(self, never: list[ray.ObjectRef[Any]]) -> None:
        while self._is_needed(never):
            with suppress(ray.exceptions.RayError):
                if self._is_done and not self._can_be_read_again() and not loaders_of(self._stage):
                    time.sleep(_POLL_S)  # results that were returned just now are on their way
                    break
        self._end()

    def _can_be_read_again(self) -> bool:
        return self._record is not None and self._record.retries > 0

    def _is_needed(self, never: list[ray.ObjectRef[Any]]) -> bool:
        record = self._record
        if record is None:
            return not ray.wait(never, timeout=_POLL_S, fetch_local=False)[0]
        time.sleep(_POLL_S)
        return time.time() < record.used + record.ttl_s


def start_guard(stage: str, kept: str | None = None) -> Any:
    """Start the guard of a stage that this process submits, on its node, and let it watch over this process.

    Args:
        kept: the name under which the loaded state is to be kept.
    """
    remote: Any = ray.remote(Guard)
    options: dict[str, Any] = {
        "num_cpus": 0,
        "name": guard_name(stage, kept),
        "namespace": NAMESPACE,
        "lifetime": "detached",
    }
    here = ray.get_runtime_context().get_node_id()  # what is kept outlives the nodes of loaders
    options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(here, soft=True)
    guard: Any = remote.options(**options, max_concurrency=_MAX_WAITING).remote(stage)
    guard.watch.remote([guard.never.remote()])
    return guard
