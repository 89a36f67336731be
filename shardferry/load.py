"""Load one rank's optimizer state: plan, agree, allocate, read, seal. Used by loader actors and inside trainers alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import Module
from torch.optim import Optimizer

from shardferry.arena import Arena, HostArena, allocate_arena
from shardferry.checkpoint.catalog import Catalog
from shardferry.checkpoint.open import opened_storage, read_catalog
from shardferry.config import KeyPolicy, LoadRequest, Selection, dtype_policy
from shardferry.errors import HandoffError
from shardferry.exchange.agreement import Agreement
from shardferry.exchange.point_to_point import Channel, Deadline
from shardferry.exchange.rank_info import Neighbours, Strategy, Word, taken_by_any, word_of
from shardferry.exchange.together import Together
from shardferry.handoff.handle import InProcess, Payload, ShardHandle, SharedMemory
from shardferry.layout.tensor_layout import RankLayout, replicated
from shardferry.optimizer.install import fit
from shardferry.optimizer.live import LiveModel, live_layout
from shardferry.plan.manifest import Manifest, StateTensor, StateValue
from shardferry.plan.match_keys import KeyReport
from shardferry.plan.planner import LoadPlan, plan_load, plan_tensors, value_keys
from shardferry.read.execute import Counters, ReadOptions, read_objects, read_plan, read_strategy
from shardferry.storage.base import RangeReader
from shardferry.storage.open import open_storage
from shardferry.storage.retry import RetryPolicy


class PhaseClock:
    """Seconds by phase; of a phase within another one, they count to the inner one alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._within_s = 0.0  # of phases within the one that is under way

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside the ``with`` to a phase."""
        start, beside_s, self._within_s = time.perf_counter(), self._within_s, 0.0
        try:
            yield
        finally:
            spent_s = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent_s - self._within_s
            self._within_s = beside_s + spent_s


@dataclass
class LoadedShard:
    """One rank's filled arena, and what is known of it."""

    plan: LoadPlan
    manifest: Manifest
    arena: Arena
    counters: Counters
    seconds: dict[str, float]
    strategy: Strategy
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

    def handle(self, transport: str, *, exclusive: bool) -> ShardHandle:
        """A handle for the trainer.

        Args:
            transport: ``shared_memory``, ``object_store`` or ``in_process``.
            exclusive: the trainer gets the arena itself, and nobody else may open it. Otherwise the arena is frozen,
                and each opener gets private pages where it writes.

        Raises:
            HandoffError: shared memory of an arena on a GPU, or a transport that isn't one of the three.
        """
        if transport == "in_process":
            return ShardHandle(self.manifest, InProcess(self.arena, self.arena.nbytes))
        if transport == "object_store":
            data = self.arena.tensor(0, (self.arena.nbytes,), torch.uint8).cpu().numpy()
            return ShardHandle(self.manifest, Payload(data))
        if transport != "shared_memory":
            raise HandoffError(f"{transport!r} is no transport; use shared_memory, object_store or in_process")
        if not isinstance(self.arena, HostArena):
            raise HandoffError(
                f"shared_memory needs an arena on the host, this one is on {self.arena.device}; use device: cpu"
            )
        if not self.arena.is_shareable:
            raise HandoffError("this shard was loaded for its own process alone (LoadJob.stays_here); use in_process")
        if exclusive:
            self.arena.detach()
        else:
            self.arena.freeze()
        return ShardHandle(self.manifest, SharedMemory.of(self.arena, exclusive=exclusive))


@dataclass(frozen=True)
class LoadJob:
    """What to load, for one rank, and how."""

    catalog: Catalog
    layout: RankLayout
    request: LoadRequest
    device: torch.device
    read: ReadOptions
    stays_here: bool = False  # the shard is for this process alone


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
        values: where one rank has read them for all already, see `open_for_all`.
        storage: of the checkpoint, open already; default: opened here, and closed.

    Raises:
        ShardferryError: this rank's own failure.
        RankError: another rank's failure.
    """
    counters, clock = counters or Counters(), PhaseClock()
    if values is None:
        with clock.phase("values"):
            values = agreement.from_first("reading the param groups", lambda: _read_values(job, counters))
    with ExitStack() as opened:
        with clock.phase("agree"):
            ready, words = _prepare(
                job, agreement, values, arena, clock, lambda: storage or opened.enter_context(_opened(job))
            )
            unexpected = _check_claims(ready.plan, job, words)
            announce(ready.plan)
            neighbours = Neighbours.of(job, words, agreement)
            neighbours.check_room()
            strategy = neighbours.strategy(job, ready.plan, ready.storage, agreement, counters)
        with clock.phase("read"):
            together = _together(job, strategy, neighbours, agreement)
            agreement.attempt("reading", lambda: _read(job, ready, counters, together))
    manifest = _manifest(ready.plan, values)
    return LoadedShard(ready.plan, manifest, ready.arena, counters, clock.seconds, strategy, unexpected)


@dataclass(frozen=True)
class _Ready:
    """What a rank has before anything is read."""

    plan: LoadPlan
    arena: Arena
    storage: RangeReader
    is_new: bool  # the arena: nothing was written to it


def _prepare(
    job: LoadJob,
    agreement: Agreement,
    values: Mapping[str, Any],
    arena: Arena | None,
    clock: PhaseClock,
    open_files: Callable[[], RangeReader],
) -> tuple[_Ready, list[Word]]:
    """This rank's plan, arena and storage, and every rank's word that it has them."""
    made: list[_Ready] = []

    def prepare() -> Word:
        with clock.phase("plan"):
            plan = plan_load(job.catalog, job.layout, job.request, values)
        with clock.phase("allocate"):
            place = _allocate(job, plan, arena)
        storage = open_files()
        storage.expect(job.catalog.file_versions)
        made.append(_Ready(plan, place, storage, is_new=arena is None))
        return word_of(job, plan, place, storage, agreement, is_new=arena is None)

    words = agreement.share("planning", prepare)
    return made[0], words


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
    """Everything that is no sharded tensor, by key: read by one rank for all. Raises StorageError, DecodeError."""
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
    read_plan(plan, catalog, storage, arena, options, counters)
    return {t.key: arena.tensor(t.arena_offset, t.layout.local_shape, t.dtype).clone() for t in plan.tensors}


def _check_claims(plan: LoadPlan, job: LoadJob, words: Sequence[Word]) -> tuple[str, ...]:
    """Names that are saved and wanted by no rank. All ranks find the same; all raise where these are not ignored."""
    state, weights = plan.state_claims, plan.weight_claims
    taken = taken_by_any(words, len(state.taken) + len(weights.taken))
    unexpected = state.check(taken[: len(state.taken)], job.request, job.catalog.location)
    return unexpected + weights.check(taken[len(state.taken) :], job.request, job.catalog.location)


def rows_of(catalog: Catalog) -> dict[str, int]:
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
        rows = rows_of(job.catalog)
        for tensor in plan.tensors:
            arena.directory[rows[tensor.key]] = tensor.arena_offset
    return arena


def _together(job: LoadJob, strategy: Strategy, neighbours: Neighbours, agreement: Agreement) -> Together | None:
    if strategy.plan is None:
        return None
    group = agreement.host_group
    channel = None if group is None else Channel(group, Deadline(job.read.timeout_s))
    return Together(strategy.plan, neighbours.addresses, channel)


def _read(job: LoadJob, ready: _Ready, counters: Counters, together: Together | None) -> None:
    plan, arena, storage = ready.plan, ready.arena, ready.storage
    if together is None:
        if job.stays_here and ready.is_new and isinstance(arena, HostArena):
            arena.keep_to_itself()
        read_plan(plan, job.catalog, storage, arena, job.read, counters)
        return
    with together.begin(plan, arena, rows_of(job.catalog), job.read.memory_budget_bytes, counters.busy) as sharing:
        read_plan(plan, job.catalog, storage, arena, job.read, counters, sharing)


def _manifest(plan: LoadPlan, values: Mapping[str, Any]) -> Manifest:
    return Manifest(
        plan.world_rank,
        plan.world_size,
        plan.mesh,
        tuple(
            StateTensor(t.fqn, t.name, t.dtype, t.layout, t.arena_offset, t.section, t.path, t.cast, t.as_parameter)
            for t in plan.tensors
        ),
        tuple(StateValue(v.fqn, v.path, values[v.key], v.section) for v in plan.values),
        plan.param_groups or (),
        plan.fqns,
        plan.request,
    )


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
    strategy: str = "auto",
    concurrency: int = 16,
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
        keys: ``strict``, or what may be: ``allow_missing`` leaves live state of parameters that were not saved as it is,
            ``ignore_unexpected`` leaves saved state that no rank wants. Or a list of both.
        rename: glob over saved FQNs to what they are called here, ``{"_orig_mod.*": "*"}``; the first that fits.
        include, exclude: globs over the FQNs here; what is not meant stays as it is.
        dtype: ``error`` or ``cast``, where live state (or with ``model_key`` a weight) has another dtype than was saved.
        strategy: ``cooperative`` lets ranks read for each other, so that each byte leaves storage once; with ``direct`` each
            reads for itself; ``auto`` does what takes less time, by a short probe of the storage.
        concurrency: reads in flight of this rank.

    Returns:
        What was missing or unexpected, as far as ``keys`` lets it pass.

    Raises:
        ShardferryError: nothing of the optimizer has been changed. Where one rank fails, all raise.
    """
    if process_group is None and dist.is_initialized():
        process_group = dist.group.WORLD
    agreement = Agreement(process_group)
    live = LiveModel.of(model, optimizer)

    def prepare() -> tuple[LoadRequest, RankLayout, ReadOptions, RangeReader]:
        request = LoadRequest(
            optimizer_key, model_key, Selection.of(rename, include, exclude), KeyPolicy.of(keys), dtype_policy(dtype)
        )
        layout = live_layout(live, world_rank=agreement.rank, world_size=agreement.size)
        options = ReadOptions(concurrency, strategy=read_strategy(strategy))
        return request, layout, options, open_storage(location, storage_options)

    request, layout, options, storage = agreement.attempt("reading the model's layout", prepare)
    with closing(storage):
        counters = Counters()
        catalog, values = open_for_all(storage, agreement, request, options, counters, storage_options)
        job = LoadJob(catalog, layout, request, live.device, options, stays_here=True)
        loaded = load_rank(job, agreement, counters=counters, values=values, storage=storage)
    shard = loaded.handle("in_process", exclusive=True).open()
    install = agreement.attempt("fitting the state to the optimizer", lambda: fit(shard, live))
    agreement.attempt("installing the state", install)
    return KeyReport(loaded.plan.missing, loaded.unexpected)


def open_for_all(
    storage: RangeReader,
    agreement: Agreement,
    request: LoadRequest,
    options: ReadOptions,
    counters: Counters,
    storage_options: Mapping[str, Any] | None = None,
) -> tuple[Catalog, dict[str, Any]]:
    """Rank 0 reads the metadata, and all that is no sharded tensor; the others get both from it, in one go.

    Args:
        storage: of the checkpoint.
        storage_options: with which it was opened; they go with the catalog.
    """

    def read() -> tuple[Catalog, dict[str, Any]]:
        catalog = read_catalog(storage, storage_options=storage_options)
        storage.expect(catalog.file_versions)
        return catalog, read_values(catalog, request, storage, options, counters)

    return agreement.from_first("opening the checkpoint", read)
