"""Load one rank's optimizer state: plan, agree, allocate, read, seal. Used by loader actors and inside trainers alike."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shardferry.agreement import Agreement
from shardferry.arena import Arena, HostArena, allocate_arena, check_host_room
from shardferry.catalog import Catalog
from shardferry.checkpoint import open_checkpoint, storage_of
from shardferry.collector import paused_gc
from shardferry.errors import HandoffError
from shardferry.handoff import InProcess, Manifest, Payload, ShardHandle, SharedMemory, StateTensor, node_identity
from shardferry.install import load_into
from shardferry.layout import RankLayout
from shardferry.live import live_layout
from shardferry.param_groups import build_param_groups
from shardferry.plan import LoadPlan, plan_load
from shardferry.reader import Counters, ReadOptions, read_objects, read_plan


class PhaseClock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside the ``with`` to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass
class LoadedShard:
    """One rank's filled arena, and what is known of it."""

    plan: LoadPlan
    manifest: Manifest
    arena: Arena
    counters: Counters
    seconds: dict[str, float] = field(default_factory=dict)

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
    optimizer_key: str
    device: torch.device
    read: ReadOptions


def load_rank(
    job: LoadJob,
    agreement: Agreement,
    *,
    counters: Counters | None = None,
    announce: Callable[[LoadPlan], None] = lambda _: None,
) -> LoadedShard:
    """Load one rank's share. All ranks of the agreement must call it; where one fails, all raise.

    Args:
        counters: grows while the rank reads.
        announce: called once with the plan, before anything is read.

    Raises:
        ShardferryError: this rank's own failure.
        RankError: another rank's failure.
    """
    counters = counters or Counters()
    clock = PhaseClock()
    with clock.phase("plan"):
        plan = agreement.attempt(
            "planning", lambda: plan_load(job.catalog, job.layout, optimizer_key=job.optimizer_key)
        )
        announce(plan)
    with clock.phase("allocate"):
        arena = _allocate(plan, job.device, agreement)
    with clock.phase("read"):
        values = agreement.attempt("reading", lambda: _read(job, plan, arena, counters))
    with clock.phase("seal"):
        manifest = agreement.attempt("sealing", lambda: _manifest(plan, values, arena))
    return LoadedShard(plan, manifest, arena, counters, clock.seconds)


def _allocate(plan: LoadPlan, device: torch.device, agreement: Agreement) -> Arena:
    host = node_identity()
    asked = agreement.share("planning", lambda: (host, plan.arena_bytes if device.type == "cpu" else 0))
    here = [nbytes for other, nbytes in asked if other == host]

    def allocate() -> Arena:
        check_host_room(arenas_bytes=sum(here), num_arenas=len(here), host=socket.gethostname())
        return allocate_arena(plan.arena_bytes, device)

    return agreement.attempt("allocating the arena", allocate)


def _read(job: LoadJob, plan: LoadPlan, arena: Arena, counters: Counters) -> dict[str, Any]:
    storage = storage_of(job.catalog)
    try:
        read_plan(plan, job.catalog, storage, arena, job.read, counters)
        return read_objects(plan, job.catalog, storage, counters)
    finally:
        storage.close()


def _manifest(plan: LoadPlan, values: dict[str, Any], arena: Arena) -> Manifest:
    tensors = [StateTensor(t.fqn, t.name, t.dtype, t.layout, t.arena_offset) for t in plan.tensors if t.fqn]
    state: dict[str, dict[str, Any]] = {}
    groups: dict[Any, Any] = {
        t.group_path: arena.tensor(t.arena_offset, t.layout.local_shape, t.dtype).cpu().clone()
        for t in plan.tensors
        if t.group_path is not None
    }
    for planned in plan.objects:
        if planned.fqn is None:
            groups[planned.path] = values[planned.key]
        else:
            state.setdefault(planned.fqn, {})[planned.name] = values[planned.key]
    return Manifest(
        plan.world_rank, plan.world_size, plan.mesh, tuple(tensors), state, tuple(build_param_groups(groups))
    )


def load_optimizer_state(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    location: str | Path,
    *,
    optimizer_key: str = "optim",
    process_group: dist.ProcessGroup | None = None,
    concurrency: int = 16,
) -> None:
    """Load an optimizer's state in place, resharding as needed: from any number of ranks to those of this job.

    Call it on all ranks of the process group, after the model is wrapped and the optimizer is made; neither needs to
    have taken a step. Only this rank's bytes are read.

    Args:
        location: the checkpoint's directory, written by ``torch.distributed.checkpoint``.
        optimizer_key: the optimizer's key in the state dict that was saved.
        process_group: default: the whole job where torch.distributed is initialised, else this process alone.
        concurrency: reads in flight of this rank.

    Raises:
        ShardferryError: nothing of the optimizer has been changed. Where one rank fails, all raise.
    """
    if process_group is None and dist.is_initialized():
        process_group = dist.group.WORLD
    agreement = Agreement(process_group)
    catalog = catalog_of_all(location, agreement, process_group)
    layout, device = agreement.attempt(
        "reading the model's layout",
        lambda: (
            live_layout(model, optimizer, world_rank=agreement.rank, world_size=agreement.size),
            _device_of(model),
        ),
    )
    job = LoadJob(catalog, layout, optimizer_key, device, ReadOptions(concurrency))
    loaded = load_rank(job, agreement)
    agreement.attempt(
        "installing the state",
        lambda: load_into(loaded.handle("in_process", exclusive=True).open(), model, optimizer),
    )


def catalog_of_all(location: str | Path, agreement: Agreement, process_group: dist.ProcessGroup | None) -> Catalog:
    """Rank 0 reads the metadata; the others get the catalog from it."""
    found: list[Catalog | None] = [None]
    if agreement.rank == 0:
        found[0] = agreement.attempt("opening the checkpoint", lambda: open_checkpoint(os.fspath(location)))
    else:
        agreement.attempt("opening the checkpoint", lambda: None)
    if process_group is not None:
        with paused_gc():
            dist.broadcast_object_list(found, group=process_group, group_src=0)
    assert found[0] is not None
    return found[0]


def _device_of(model: torch.nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
