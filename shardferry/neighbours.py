"""Meet the ranks that share this one's memory, make room for all of their arenas, and decide whether they read for each other."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from shardferry.agreement import Agreement
from shardferry.arena import HostArena, check_host_room
from shardferry.catalog import Catalog
from shardferry.checkpoint import storage_of
from shardferry.handoff import node_identity
from shardferry.layout import RankLayout, TensorLayout
from shardferry.peers import ArenaAddress
from shardferry.plan import LoadPlan
from shardferry.probe import answers_from_memory
from shardferry.reader import ReadOptions
from shardferry.sharing import SharedPlan, share_reads
from shardferry.spec_layout import SpecLayout
from shardferry.wants import SpecWants, ToldWants, Wants, told

_LOCAL_SLAB_BYTES = 1 << 20  # fits a core's cache, so that what is read for others is copied out of the cache
MAX_TOLD_RANKS = 256  # with live layouts each rank hears of every other's


class Job(Protocol):
    """What is asked of a `shardferry.load.LoadJob` here."""

    @property
    def catalog(self) -> Catalog: ...
    @property
    def layout(self) -> RankLayout: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def read(self) -> ReadOptions: ...


@dataclass(frozen=True, slots=True)
class Strategy:
    """Who reads what, and why."""

    name: Literal["direct", "cooperative"]
    reason: str
    plan: SharedPlan | None = None  # of cooperative reads


@dataclass(frozen=True, slots=True)
class _Word:
    """What each rank says of itself."""

    node: str
    host_bytes: int  # of its arena; 0 where that is on a GPU
    address: ArenaAddress | None  # of its arena, where that is on the host
    alone_because: str  # why it reads for itself; empty where it can read with others
    in_memory: bool  # what it reads is in the page cache
    layouts: Mapping[str, TensorLayout] | None  # of a live model; what a spec says everybody knows


@dataclass(frozen=True)
class Neighbours:
    """The ranks of this node, by world rank, ascending."""

    words: Mapping[int, _Word]
    spec: SpecLayout | None

    @property
    def addresses(self) -> dict[int, ArenaAddress]:
        """Where their arenas are."""
        return {rank: word.address for rank, word in self.words.items() if word.address is not None}

    def strategy(self, job: Job, plan: LoadPlan) -> Strategy:
        """Whether the node's ranks read for each other, and this rank's part. All of them find the same."""
        because = next((word.alone_because for word in self.words.values() if word.alone_because), "")
        if not because and len(self.words) < 2:
            because = "no other rank is on this node"
        if not because and job.read.strategy == "auto" and all(word.in_memory for word in self.words.values()):
            because = "the page cache has what is read: a copy for others would cost as much as a read by themselves"
        if because:
            return Strategy("direct", because)
        shared = share_reads(plan, job.catalog, self._wants(), max_slab_bytes=slab_bytes(job.catalog))
        return Strategy("cooperative", f"{len(self.words)} ranks on this node share memory", shared)

    def _wants(self) -> Wants:
        if self.spec is not None:
            return SpecWants(self.spec, list(self.words))
        return ToldWants({rank: word.layouts or {} for rank, word in self.words.items()})

    def check_room(self) -> None:
        """Raises ArenaError where the host has no room for all of its ranks' arenas."""
        sizes = [word.host_bytes for word in self.words.values()]
        check_host_room(arenas_bytes=sum(sizes), num_arenas=len(sizes), host=socket.gethostname())


def slab_bytes(catalog: Catalog) -> int:
    """How much one rank reads for others in one go: more where a request takes long."""
    storage = storage_of(catalog)
    try:
        return _LOCAL_SLAB_BYTES if storage.traits.is_local else storage.traits.max_request_bytes
    finally:
        storage.close()


def meet_neighbours(job: Job, plan: LoadPlan, arena: HostArena | None, agreement: Agreement) -> Neighbours:
    """Hear of every rank where it runs and how much memory it will take; all ranks must call it.

    Args:
        arena: this rank's, reserved; None where it will be on a GPU.
    """
    spec, node = job.layout.spec, job.read.node or node_identity()

    def say() -> _Word:
        because = _alone_because(job, agreement.size)
        return _Word(
            node,
            0 if arena is None else plan.arena_bytes,
            None if arena is None else ArenaAddress.of(arena),
            because,
            not because and job.read.strategy == "auto" and _is_in_memory(job, plan),
            told(plan) if not because and spec is None and agreement.size > 1 else None,
        )

    words = agreement.share("planning", say)
    here = {rank: other for rank, other in enumerate(words) if other.node == node}
    return Neighbours(here, spec)


def _is_in_memory(job: Job, plan: LoadPlan) -> bool:
    storage = storage_of(job.catalog)
    try:
        return answers_from_memory(plan, job.catalog, storage)
    finally:
        storage.close()


def _alone_because(job: Job, world_size: int) -> str:
    if job.read.strategy == "direct":
        return "read.strategy is direct"
    if job.device.type != "cpu":
        return "arenas on GPUs can't be written by other ranks"
    if job.layout.spec is None and world_size > MAX_TOLD_RANKS:
        return f"of more than {MAX_TOLD_RANKS} live models each rank knows its own alone"
    return ""
