"""Load one rank's optimizer state: plan, agree, allocate, read, seal. Loader actors and trainers' processes call the same code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

import torch
import torch.distributed as dist
from torch.nn import Module
from torch.optim import Optimizer

from shardferry._gc import paused_gc
from shardferry.arena import Arena, HostArena, allocate_arena
from shardferry.checkpoint.catalog import Catalog
from shardferry.checkpoint.open import opened_storage, read_catalog
from shardferry.config import KeyPolicy, LoadRequest, MessageLimits, ReadKeywords, ReadOptions, Selection, dtype_policy
from shardferry.exchange.agreement import Agreement
from shardferry.exchange.delivery import open_delivery
from shardferry.exchange.peer_memory import ArenaAddress
from shardferry.exchange.point_to_point import Channel, Deadline
from shardferry.exchange.rank_info import RankInfo, check_room, rank_info, taken_by_any
from shardferry.exchange.strategy import ChosenStrategy, choose_strategy, plan_cooperation
from shardferry.layout.rank_layout import RankLayout
from shardferry.layout.tensor_layout import replicated
from shardferry.optimizer.install import fit
from shardferry.optimizer.live import LiveModel, live_layout
from shardferry.optimizer.loaded_state import LoadedState
from shardferry.plan.load_plan import LoadPlan, Manifest
from shardferry.plan.match_keys import KeyReport, unexpected_keys
from shardferry.plan.planner import plan_load, plan_tensors, value_keys
from shardferry.read.execute import Cooperation, read_objects, read_plan
from shardferry.stats import Counters, PhaseClock
from shardferry.storage.base import RangeReader
from shardferry.storage.open import open_storage
from shardferry.storage.retry import RetryPolicy


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

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank read for others."""
        return 0 if self.strategy.plan is None else self.strategy.plan.bytes_sent

    @property
    def bytes_forwarded(self) -> int:
        """Bytes that went through the process group, to ranks that share no memory with this one."""
        return 0 if self.strategy.plan is None else self.strategy.plan.bytes_forwarded

    @property
    def bytes_received(self) -> int:
        """Bytes that others read for this rank."""
        return 0 if self.strategy.plan is None else self.strategy.plan.bytes_received

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


def load_rank(
    job: LoadJob,
    agreement: Agreement,
    *,
    counters: Counters | None = None,
    announce: Callable[[LoadPlan], None] = lambda _: None,
    arena: Arena | None = None,
    values: Mapping[str, Any] | None = None,
    storage: RangeReader | None = None,
) -> LoadedShard:
    """Load one rank's share. All ranks of the agreement must call it; where one fails, all raise.

    Args:
        counters: grows while the rank reads.
        announce: called once with the plan, before anything is read.
        arena: to be filled, with room for the plan (see `arena_for`); default: a new one.
        values: the saved Python values where one rank has read them for all, see `open_for_all`.
        storage: of the checkpoint, open already; default: opened here, and closed.

    Raises:
        ShardferryError: this rank's own failure.
        RankError: another rank's failure.
    """
    counters, clock = counters or Counters(), PhaseClock()
    if values is None:
        with clock.phase("values"):
            values = agreement.from_rank0("reading the param groups", lambda: _read_values(job, counters))
    with ExitStack() as opened, paused_gc():
        with clock.phase("agree"):
            ready, ranks = _prepare(
                job,
                agreement,
                values,
                clock,
                arena=arena,
                open_files=lambda: storage or opened.enter_context(_opened(job)),
            )
            unexpected = _check_unexpected(ready.plan, job, ranks)
            announce(ready.plan)
            check_room(ranks)
            strategy = _choose_strategy(job, ready, ranks, agreement)
        with clock.phase("read"):
            agreement.all_or_raise(
                "reading", lambda: _read(job, ready, ranks, strategy, agreement=agreement, counters=counters)
            )
    return LoadedShard(
        plan=ready.plan,
        manifest=ready.plan.manifest(),
        arena=ready.arena,
        counters=counters,
        seconds=clock.seconds,
        strategy=strategy,
        unexpected=unexpected,
    )


@dataclass
class _Ready:
    """What a rank has prepared before anything is read."""

    plan: LoadPlan
    arena: Arena
    is_new: bool  # the arena: nothing was written to it
    storage: RangeReader


def _prepare(
    job: LoadJob,
    agreement: Agreement,
    values: Mapping[str, Any],
    clock: PhaseClock,
    *,
    arena: Arena | None,
    open_files: Callable[[], RangeReader],
) -> tuple[_Ready, list[RankInfo]]:
    """This rank's plan, arena and storage, and what every rank tells once it has them."""
    made: list[_Ready] = []

    def prepare() -> RankInfo:
        with clock.phase("plan"):
            plan = plan_load(job.catalog, job.layout, job.request, values)
        with clock.phase("allocate"):
            to_fill = _allocate(job, plan, arena)
        storage = open_files()
        storage.expect(job.catalog.file_versions)
        made.append(_Ready(plan, to_fill, arena is None, storage))
        return rank_info(plan, to_fill, job.layout, job.read, agreement, is_new_arena=arena is None)

    ranks = agreement.gather("planning", prepare)
    return made[0], ranks


def _choose_strategy(job: LoadJob, ready: _Ready, ranks: Sequence[RankInfo], agreement: Agreement) -> ChosenStrategy:
    """The strategy, with this rank's part where ranks read for each other."""
    traits, is_connected = ready.storage.traits, agreement.host_group is not None
    chosen = choose_strategy(
        ranks,
        world_rank=agreement.rank,
        asked=job.read.strategy,
        is_local=traits.is_local,
        is_connected=is_connected,
    )
    if chosen.name == "direct":
        return chosen
    limits = traits.split_limits(traits.read_limits(job.read))
    plan = plan_cooperation(ready.plan, job.catalog, job.layout, ranks, is_connected=is_connected, limits=limits)
    return replace(chosen, plan=plan)


def _read(
    job: LoadJob,
    ready: _Ready,
    ranks: Sequence[RankInfo],
    strategy: ChosenStrategy,
    *,
    agreement: Agreement,
    counters: Counters,
) -> None:
    plan, own = ready.plan, ranks[agreement.rank]
    ranks_on_node = sum(rank.node == own.node for rank in ranks)
    if strategy.plan is None:
        if job.stays_here and ready.is_new and isinstance(ready.arena, HostArena):
            ready.arena.close()
            ready.arena = HostArena.private(plan.arena_bytes)
        _read_plan(job, ready, counters, None, ranks_on_node)
        return
    group = agreement.host_group
    delivery = open_delivery(
        plan,
        strategy.plan,
        ready.arena,
        rows=_rows_of(job.catalog),
        addresses=_addresses(ranks, own.memory_group),
        channel=None if group is None else Channel(group, Deadline(job.read.load_s)),
        memory_budget_bytes=job.read.memory_budget,
        busy=counters.busy,
        limits=job.messages,
    )
    with delivery as way:
        _read_plan(job, ready, counters, Cooperation(strategy.plan, way), ranks_on_node)


def _read_plan(
    job: LoadJob, ready: _Ready, counters: Counters, cooperation: Cooperation | None, ranks_on_node: int
) -> None:
    read_plan(
        ready.plan,
        job.catalog,
        ready.storage,
        ready.arena,
        options=job.read,
        counters=counters,
        cooperation=cooperation,
        ranks_on_node=ranks_on_node,
    )


def _addresses(ranks: Sequence[RankInfo], memory_group: str) -> dict[int, ArenaAddress]:
    """The arenas of a memory group, by world rank."""
    return {
        rank: info.address
        for rank, info in enumerate(ranks)
        if info.memory_group == memory_group and info.address is not None
    }


def _opened(job: LoadJob) -> AbstractContextManager[RangeReader]:
    return opened_storage(job.catalog, retry=RetryPolicy(max_attempts=job.read.max_attempts))


def _read_values(job: LoadJob, counters: Counters) -> dict[str, Any]:
    with _opened(job) as storage:
        return read_values(job.catalog, job.request, storage, job.read, counters)


def read_values(
    catalog: Catalog,
    request: LoadRequest,
    storage: RangeReader,
    options: ReadOptions | None = None,
    counters: Counters | None = None,
) -> dict[str, Any]:
    """Everything that is not a sharded tensor, by key: one rank reads it for all. Raises StorageError, DecodeError."""
    options, counters = options or ReadOptions(), counters or Counters()
    keys = value_keys(catalog, request)
    objects = [key for key in keys if key in catalog.objects]
    tensors = [key for key in keys if key in catalog.tensors]
    values = read_objects(objects, catalog, storage, options, counters)
    return values | _read_whole(tensors, catalog, storage, options, counters)


def _read_whole(
    keys: list[str], catalog: Catalog, storage: RangeReader, options: ReadOptions, counters: Counters
) -> dict[str, torch.Tensor]:
    """Small tensors: hyperparameters such as a learning rate."""
    wanted = [(key, replicated(catalog.tensors[key].shape)) for key in keys]
    plan = plan_tensors(catalog, wanted, world_rank=0, world_size=1)
    arena = HostArena(plan.arena_bytes)
    read_plan(plan, catalog, storage, arena, options=options, counters=counters)
    return {t.key: arena.tensor(t.arena_offset, t.layout.local_shape, t.dtype).clone() for t in plan.tensors}


def _check_unexpected(plan: LoadPlan, job: LoadJob, ranks: Sequence[RankInfo]) -> tuple[str, ...]:
    """Names that are saved and that no rank takes. Every rank finds the same; all raise if the request doesn't ignore them."""
    state, weights = plan.state_keys, plan.weight_keys
    taken = taken_by_any(ranks, len(state) + len(weights))
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


def load_optimizer_state(
    model: Module | Sequence[Module],
    optimizer: Optimizer | Sequence[Optimizer],
    location: str | Path,
    *,
    optimizer_key: str = "optim",
    model_key: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    process_group: dist.ProcessGroup | None = None,
    keys: str | Sequence[str] = "strict",
    rename: Mapping[str, str] | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    dtype: str = "error",
    **read: Unpack[ReadKeywords],
) -> KeyReport:
    """Load an optimizer's state in place, resharding as needed: from any number of ranks to those of this job.

    Call it on all ranks of the process group, after the model is wrapped and the optimizer is made; neither needs to
    have taken a step. Only this rank's bytes are read.

    Args:
        model: wrapped as it is trained (DDP, FSDP1, FSDP2, tensor parallel, or plain); several parts where a rank has several.
        optimizer: of that model; several where the state of several was saved as one.
        location: the checkpoint's directory, or any URL that fsspec can open.
        optimizer_key: the optimizer's key in the state dict that was saved; dots lead into nested ones.
        model_key: the model's key in the state dict that was saved, to load its weights and buffers too.
        storage_options: of a URL: credentials, an endpoint.
        process_group: default: the whole job where torch.distributed is initialised, else this process alone.
        keys: ``strict``; or ``allow_missing``, which leaves live state of parameters that were not saved as it is;
            ``ignore_unexpected``, which leaves saved state that no rank wants; or a list of both.
        rename: glob over saved FQNs to their names here, ``{"_orig_mod.*": "*"}``; the first that matches.
        include, exclude: globs over the FQNs here; the state of other parameters stays as it is.
        dtype: ``error`` or ``cast``, where live state (or with ``model_key`` a weight) has another dtype than was saved.
        **read: the options of the spec's ``read`` section, and ``load_s``; see `shardferry.config.ReadOptions`. With
            ``strategy="cooperative"`` ranks read for each other, so that each byte leaves storage once; with ``"direct"`` each
            rank reads for itself; ``"auto"`` reads directly from local files on one node, else cooperatively.

    Returns:
        The keys that were missing or unexpected and that ``keys`` tolerated.

    Raises:
        ShardferryError: nothing of the optimizer has been changed. Where one rank fails, all raise.
    """
    if process_group is None and dist.is_initialized():
        process_group = dist.group.WORLD
    agreement = Agreement(process_group)
    live = LiveModel.of(model, optimizer)

    def prepare() -> tuple[LoadRequest, RankLayout, ReadOptions, RangeReader]:
        request = LoadRequest(
            optimizer_key=optimizer_key,
            model_key=model_key,
            selection=Selection.of(rename, include, exclude),
            keys=KeyPolicy.of(keys),
            dtype=dtype_policy(dtype),
        )
        layout = live_layout(live, world_rank=agreement.rank, world_size=agreement.size)
        return request, layout, ReadOptions.of(read), open_storage(location, storage_options)

    request, layout, options, storage = agreement.all_or_raise("reading the model's layout", prepare)
    with closing(storage):
        counters = Counters()
        catalog, values = open_for_all(
            storage, agreement, request, options=options, counters=counters, storage_options=storage_options
        )
        job = LoadJob(catalog, layout, request, live.device, options, stays_here=True)
        loaded = load_rank(job, agreement, counters=counters, values=values, storage=storage)
    install = agreement.all_or_raise("fitting the state to the optimizer", lambda: fit(loaded.state(), live))
    agreement.all_or_raise("installing the state", install)
    return KeyReport(loaded.plan.missing, loaded.unexpected)


def open_for_all(
    storage: RangeReader,
    agreement: Agreement,
    request: LoadRequest,
    options: ReadOptions,
    counters: Counters,
    storage_options: Mapping[str, Any] | None = None,
) -> tuple[Catalog, dict[str, Any]]:
    """Rank 0 reads the metadata and everything that is not a sharded tensor; one broadcast gives both to all ranks.

    Args:
        storage: of the checkpoint.
        storage_options: with which it was opened; they go with the catalog.
    """

    def read() -> tuple[Catalog, dict[str, Any]]:
        catalog = read_catalog(storage, storage_options=storage_options)
        storage.expect(catalog.file_versions)
        return catalog, read_values(catalog, request, storage, options, counters)

    return agreement.from_rank0("opening the checkpoint", read)
