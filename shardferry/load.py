"""Load one rank's optimizer state: plan, agree, allocate, read, seal. Loader actors and trainers' processes call the same code."""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import chain
from typing import Any

import torch

from shardferry._gc import paused_gc
from shardferry.arena import Arena, HostArena, allocate_arena, host_identity
from shardferry.checkpoint.catalog import Catalog
from shardferry.checkpoint.open import opened_storage, read_catalog
from shardferry.checkpoint.optimizer_state import index_optimizer
from shardferry.config import LoadRequest, MessageLimits, ReadOptions
from shardferry.errors import CheckpointNotFound, DecodeError, MissingFile
from shardferry.exchange.agreement import Agreement, Balance
from shardferry.exchange.delivery import open_delivery
from shardferry.exchange.node_files import (
    NodeFiles,
    first_to_have,
    gather_node_files,
    lacking_error,
    ranks_of_files,
    with_asked,
)
from shardferry.exchange.point_to_point import Channel
from shardferry.exchange.rank_info import ASKED_DIRECT, RankInfo, check_room, rank_info, taken_by_any
from shardferry.exchange.strategy import ChosenStrategy, choose_strategy
from shardferry.layout.rank_layout import RankLayout
from shardferry.layout.tensor_layout import replicated
from shardferry.optimizer.loaded_state import LoadedState
from shardferry.plan.load_plan import LoadPlan, Manifest
from shardferry.plan.match_keys import unexpected_keys
from shardferry.plan.planner import plan_load, plan_tensors, value_keys
from shardferry.read.execute import read_classes, read_objects, read_plan
from shardferry.read.items import items_of
from shardferry.read.objects import ForeignClass, allowed_classes
from shardferry.state_dicts import EXTRA_STATE, LeftLive
from shardferry.stats import Counters, PhaseClock, StorageRequest, Work
from shardferry.storage.base import RangeReader
from shardferry.storage.retry import RetryPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFigures:
    """What one rank's load has counted. The names are those of the stage's report."""

    bytes_needed: int
    bytes_read: int
    bytes_sent: int  # read for other ranks
    bytes_received: int  # read by other ranks
    bytes_forwarded: int  # sent through the process group, to ranks that share no memory with this one
    num_requests: int
    num_retries: int  # of requests
    arena_bytes: int
    device: str  # of the arena
    strategy: str
    strategy_reason: str
    busy: Mapping[str, float]  # seconds by kind of work; kinds overlap
    work: tuple[Work, ...]  # when each kind was done
    seconds: Mapping[str, float]  # by phase; phases don't overlap
    file_bytes: Mapping[str, int]  # asked of the storage, by file
    requests: tuple[StorageRequest, ...]  # some of them where there are very many
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def combined(loads: Sequence[LoadFigures]) -> LoadFigures:
    """The figures of loads that followed each other: numbers are added, words are listed once."""
    if len(loads) == 1:
        return loads[0]

    def of(name: str) -> Any:
        values = [getattr(load, name) for load in loads]
        if isinstance(values[0], str):
            return "; ".join(dict.fromkeys(values))
        if isinstance(values[0], Mapping):
            return {key: sum(value.get(key, 0) for value in values) for value in values for key in value}
        return sum(values, start=type(values[0])())

    return LoadFigures(**{entry.name: of(entry.name) for entry in fields(LoadFigures)})


@dataclass
class LoadedShard:
    """One rank's filled arena, with its plan and its counters."""

    plan: LoadPlan
    manifest: Manifest
    arena: Arena
    counters: Counters
    seconds: dict[str, float]
    strategy: ChosenStrategy
    unexpected: tuple[str, ...] = ()  # saved, wanted by no rank, allowed

    def figures(self) -> LoadFigures:
        """What the load has counted."""
        shared = self.strategy.plan
        return LoadFigures(
            bytes_needed=self.plan.bytes_needed,
            bytes_read=self.counters.bytes_requested,
            bytes_sent=0 if shared is None else shared.bytes_sent,
            bytes_received=0 if shared is None else shared.bytes_received,
            bytes_forwarded=0 if shared is None else shared.bytes_forwarded,
            num_requests=self.counters.num_requests,
            num_retries=self.counters.num_retries,
            arena_bytes=self.arena.nbytes,
            device=str(self.arena.device),
            strategy=self.strategy.name,
            strategy_reason=self.strategy.reason,
            busy=dict(self.counters.busy.seconds),
            work=self.counters.busy.work,
            seconds=self.seconds,
            file_bytes=dict(self.counters.file_bytes),
            requests=self.counters.requests.kept(),
            missing=self.plan.missing,
            unexpected=self.unexpected,
        )

    def state(self) -> LoadedState:
        """Views on the loaded state, for this process alone; `shardferry.handoff.make_handle` takes it to another one."""
        return LoadedState(self.manifest, self.arena.as_bytes())


@dataclass(frozen=True)
class LoadJob:
    """What one rank loads, and how."""

    catalog: Catalog
    layout: RankLayout
    request: LoadRequest
    device: torch.device
    read: ReadOptions
    stays_here: bool = False  # no other process will open the shard
    messages: MessageLimits = field(default_factory=MessageLimits)  # between ranks that share no memory
    memory_fraction: float = 1.0  # of its host's available memory that the arenas of a host may take


def load_rank(
    job: LoadJob,
    agreement: Agreement,
    *,
    counters: Counters | None = None,
    announce: Callable[[LoadPlan], None] = lambda _: None,
    arena: Arena | None = None,
    values: Mapping[str, Any] | None = None,
    storage: RangeReader | None = None,
    check_plan: Callable[[LoadPlan], None] = lambda _: None,
) -> LoadedShard:
    """Load one rank's share. All ranks of the agreement must call it; where one fails, all raise.

    Args:
        counters: grows while the rank reads.
        announce: called once with the plan, before anything is read.
        arena: to be filled, with room for the plan (see `arena_for`); default: a new one.
        values: the saved Python values where one rank has read them for all, see `open_for_all`.
        storage: of the checkpoint, open already; default: opened here, and closed.
        check_plan: called once with the plan, before anything is read or allocated; where it raises, all ranks raise.

    Raises:
        ShardferryError: this rank's own failure.
        RankError: another rank's failure.
    """
    counters = counters or Counters()
    clock = PhaseClock(counters.enter)
    with ExitStack() as opened, paused_gc():
        if storage is None:
            with clock.phase("agree"):
                storage = agreement.all_or_raise(
                    "opening the checkpoint", lambda: opened.enter_context(_opened(job, counters))
                )
        if values is None:
            with clock.phase("values"):
                values = _values_for_all(
                    job.catalog, job.request, storage, agreement, options=job.read, counters=counters
                )
        ready: list[_Ready] = []

        def prepare() -> RankInfo:
            with clock.phase("plan"):
                plan = plan_load(job.catalog, job.layout, job.request, values)
                check_plan(plan)
            with clock.phase("allocate"):
                to_fill = _allocate(job, plan, arena)
            storage.expect(job.catalog.file_versions)
            ready.append(_Ready(plan, to_fill, arena is None, storage))
            return rank_info(
                plan,
                to_fill,
                job.layout,
                job.read,
                agreement,
                is_new_arena=arena is None,
                lacks_files=bool(storage.lacking(job.catalog.files)),
            )

        with clock.phase("agree"):
            ranks = agreement.gather("planning", prepare)
            plan = ready[0].plan
            taken = _taken_by_any(plan, ranks, agreement)
            nodes = _node_files(job, ready[0], ranks, agreement)

            def decide() -> tuple[tuple[str, ...], ChosenStrategy, LoadPlan]:
                unexpected = _check_unexpected(plan, job, taken)
                announce(plan)
                check_room(ranks, job.memory_fraction)
                strategy = _choose_strategy(job, ready[0], ranks, nodes, agreement)
                with clock.phase("read"):  # before the rest: a class may be refused
                    values = read_classes(plan, job.catalog, storage, job.read, counters)
                return unexpected, strategy, plan.with_values(values)

            unexpected, strategy, plan = agreement.all_or_raise("dividing the reads", decide, _READS_FIT)
        with clock.phase("read"):
            agreement.all_or_raise(
                "reading", lambda: _read(job, ready[0], ranks, strategy, agreement=agreement, counters=counters)
            )
    return LoadedShard(
        plan=plan,
        manifest=plan.manifest(),
        arena=ready[0].arena,
        counters=counters,
        seconds=clock.seconds,
        strategy=strategy,
        unexpected=unexpected,
    )


@dataclass
class _Ready:
    """What a rank has prepared before anything is read."""

    plan: LoadPlan  # with what other ranks ask of the files that this rank has
    arena: Arena
    is_new: bool  # the arena: nothing was written to it
    storage: RangeReader


def _reads_for_others(decided: tuple[tuple[str, ...], ChosenStrategy, LoadPlan]) -> int:
    shared = decided[1].plan
    return 0 if shared is None else shared.balance


# Else a rank would wait for what no other sends, or have zeros where no other writes.
_READS_FIT = Balance(
    _reads_for_others,
    "dividing the reads: ranks don't agree on which of them reads what for which; nothing has been read. Give all ranks the same "
    "strategy, max_request and max_gap, or set strategy: direct",
)


def _node_files(job: LoadJob, ready: _Ready, ranks: Sequence[RankInfo], agreement: Agreement) -> list[NodeFiles]:
    """Which files each rank's node has, and what others ask of them in this rank's plan; empty where every node has all."""
    if not any(rank.lacks_files for rank in ranks):
        return []
    nodes = gather_node_files(agreement, ready.storage, job.catalog, ready.plan, node=ranks[agreement.rank].node)
    ready.plan = with_asked(ready.plan, job.catalog, nodes)
    return nodes


def _choose_strategy(
    job: LoadJob, ready: _Ready, ranks: Sequence[RankInfo], nodes: Sequence[NodeFiles], agreement: Agreement
) -> ChosenStrategy:
    """The same strategy on all ranks, with this rank's part. Raises MissingFile: a node lacks files that it would read."""
    traits = ready.storage.traits
    strategy = choose_strategy(
        ready.plan,
        job.catalog,
        job.layout,
        ranks,
        asked=job.read.strategy,
        is_local=traits.is_local,
        is_connected=agreement.host_group is not None,
        limits=traits.split_limits(traits.read_limits(job.read)),
        ranks_of_files=ranks_of_files(job.catalog.files, nodes),
    )
    is_for_all = strategy.plan is not None and agreement.host_group is not None
    if (
        nodes
        and not is_for_all
        and (error := lacking_error(ready.storage.location, nodes, strategy.reason)) is not None
    ):
        raise error
    return strategy


def _read(
    job: LoadJob,
    ready: _Ready,
    ranks: Sequence[RankInfo],
    strategy: ChosenStrategy,
    *,
    agreement: Agreement,
    counters: Counters,
) -> None:
    plan, own, group = ready.plan, ranks[agreement.rank], agreement.host_group
    with ExitStack() as stack:
        delivery = None
        if strategy.plan is not None:
            members = {rank: info for rank, info in enumerate(ranks) if info.memory_group == own.memory_group}
            opened = open_delivery(
                plan,
                strategy.plan,
                ready.arena,
                rows=_rows_of(job.catalog),
                addresses={rank: info.address for rank, info in members.items() if info.address is not None},
                channel=None if group is None else Channel(group, job.read.load_s, counters.busy),
                memory_budget_bytes=job.read.memory_budget,
                busy=counters.busy,
                limits=job.messages,
            )
            delivery = stack.enter_context(opened)
        elif job.stays_here and ready.is_new and isinstance(ready.arena, HostArena):
            ready.arena.close()
            ready.arena = HostArena(plan.arena_bytes, is_shareable=False)
        read_plan(
            plan,
            job.catalog,
            ready.storage,
            ready.arena,
            options=job.read,
            counters=counters,
            delivery=delivery,
            ranks_on_node=sum(rank.node == own.node for rank in ranks),
        )


def _opened(job: LoadJob, counters: Counters) -> AbstractContextManager[RangeReader]:
    return opened_storage(job.catalog, retry=retries(job.read, counters))


def retries(options: ReadOptions, counters: Counters) -> RetryPolicy:
    """How often requests are tried, as the options say; each further attempt is counted."""
    return RetryPolicy(max_attempts=options.max_attempts, on_retry=counters.add_retry)


def read_values(
    catalog: Catalog,
    request: LoadRequest,
    storage: RangeReader,
    options: ReadOptions | None = None,
    counters: Counters | None = None,
    *,
    only: Collection[str] | None = None,
) -> dict[str, Any]:
    """Everything that is not a sharded tensor, by key: one rank reads it for all.

    What can't be decoded is left out where the request allows that: a value of a class that is not plain data becomes a
    `LeftLive`. A module's extra state that torch has not pickled stays bytes, as torch gives it.

    Args:
        only: these keys; default: all.

    Raises:
        StorageError, DecodeError: a value can't be read.
        SpecError: a class that the request allows can't be imported.
    """

    def unread(key: str, data: bytes, error: DecodeError) -> Any:
        if isinstance(error, ForeignClass):
            if request.keys.allow_missing or key in beside:
                return LeftLive(error.names)
        elif catalog.path(key)[-1] == EXTRA_STATE or key.endswith(f".{EXTRA_STATE}"):
            return io.BytesIO(data)
        raise error

    options, counters = options or ReadOptions(), counters or Counters()
    index = index_optimizer(catalog, request.optimizer_key)
    keys, beside = value_keys(catalog, request, index), set(index.extras().values())
    keys = [key for key in keys if only is None or key in only]
    objects = [key for key in keys if key in catalog.objects]
    with torch.serialization.safe_globals(allowed_classes(request.safe_globals)):
        values = read_objects(objects, catalog, storage, options, counters, unread=unread)
    # Small tensors, such as a learning rate, are read whole.
    wanted = [(key, replicated(catalog.tensors[key].shape)) for key in keys if key in catalog.tensors]
    plan = plan_tensors(catalog, wanted, world_rank=0, world_size=1)
    arena = HostArena(plan.arena_bytes)
    read_plan(plan, catalog, storage, arena, options=options, counters=counters)
    return values | {t.key: arena.tensor(t.arena_offset, t.layout.local_shape, t.dtype).clone() for t in plan.tensors}


def _taken_by_any(plan: LoadPlan, ranks: Sequence[RankInfo], agreement: Agreement) -> list[bool]:
    """Of each saved name, whether some rank takes it. Ranks that select or rename by themselves have names of their own."""
    names = [*plan.state_keys.items(), *plan.weight_keys.items()]
    if len({rank.names for rank in ranks}) == 1:
        return taken_by_any(ranks, len(names))
    taken = agreement.gather("matching the names", lambda: [name for name, is_taken in names if is_taken])
    by_any = set(chain.from_iterable(taken))
    return [name in by_any for name, _ in names]


def _check_unexpected(plan: LoadPlan, job: LoadJob, taken: Sequence[bool]) -> tuple[str, ...]:
    """Names that are saved and that no rank takes. Raises PlanError if the request doesn't ignore them."""
    state, weights = plan.state_keys, plan.weight_keys
    num_state, location = len(state), job.catalog.location
    unexpected = unexpected_keys(state, taken[:num_state], job.request, location)
    return unexpected + unexpected_keys(weights, taken[num_state:], job.request, location)


def _rows_of(catalog: Catalog) -> dict[str, int]:
    """The catalog's tensors in order, by key: the same on all ranks."""
    return {key: row for row, key in enumerate(catalog.tensors)}


def arena_for(plan: LoadPlan, catalog: Catalog) -> HostArena:
    """An arena on the host with room for a plan. It takes memory as it is filled."""
    return HostArena(plan.arena_bytes, num_places=len(catalog.tensors))


def _allocate(job: LoadJob, plan: LoadPlan, arena: Arena | None) -> Arena:
    """Raises ArenaError."""
    if arena is None:
        on_host = job.device.type == "cpu"
        arena = arena_for(plan, job.catalog) if on_host else allocate_arena(plan.arena_bytes, job.device)
    if isinstance(arena, HostArena):  # says to the ranks of its node where the tensors are
        rows = _rows_of(job.catalog)
        for tensor in plan.tensors:
            arena.directory[rows[tensor.key]] = tensor.arena_offset
    return arena


def open_for_all(
    storage: RangeReader,
    agreement: Agreement,
    request: LoadRequest,
    options: ReadOptions,
    counters: Counters,
) -> tuple[Catalog, dict[str, Any]]:
    """Rank 0 reads the metadata and gives it to all ranks, and everything that is not a sharded tensor.

    Args:
        storage: of the checkpoint.

    Raises:
        CheckpointNotFound: rank 0 finds no checkpoint; on all ranks.
    """
    catalog = agreement.from_rank0("opening the checkpoint", lambda: read_catalog(storage), same=CheckpointNotFound)
    storage.expect(catalog.file_versions)
    return catalog, _values_for_all(catalog, request, storage, agreement, options=options, counters=counters)


def _values_for_all(
    catalog: Catalog,
    request: LoadRequest,
    storage: RangeReader,
    agreement: Agreement,
    *,
    options: ReadOptions,
    counters: Counters,
) -> dict[str, Any]:
    """Everything that is not a sharded tensor, on all ranks: rank 0 reads it; what it lacks, the lowest rank that has the files.

    Raises:
        MissingFile: no rank has a file, or ranks don't read for each other.
    """
    read = partial(read_values, catalog, request, storage, options=options, counters=counters)
    with suppress(MissingFile):
        return agreement.from_rank0("reading the param groups", read, same=MissingFile)
    ranks = gather_node_files(agreement, storage, catalog, None, node=options.node or host_identity())
    if options.strategy == "direct" and (error := lacking_error(storage.location, ranks, ASKED_DIRECT)) is not None:
        raise error
    keys = value_keys(catalog, request, index_optimizer(catalog, request.optimizer_key))
    readers = {key: first_to_have([item.path for item in items_of(catalog, key)], ranks) for key in keys}
    own = {key for key, reader in readers.items() if reader == agreement.rank}
    parts = agreement.gather("reading the param groups", lambda: read(only=own))
    return {key: value for part in parts for key, value in part.items()}
