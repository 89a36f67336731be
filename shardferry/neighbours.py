"""Meet the ranks that share this one's memory, make room for all of their arenas, and decide whether they read for each other."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from shardferry.agreement import Agreement
from shardferry.arena import Arena, HostArena, allocate_arena, check_host_room
from shardferry.catalog import Catalog
from shardferry.handoff import node_identity
from shardferry.layout import RankLayout, SpecLayout, TensorLayout
from shardferry.peers import ArenaAddress
from shardferry.plan import LoadPlan
from shardferry.reader import ReadOptions
from shardferry.sharing import SharedPlan, share_reads
from shardferry.wants import SpecWants, ToldWants, Wants, told

MAX_SLAB_BYTES = 1 << 20  # fits a core's cache, so that what is read for others is copied out of the cache
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
class _Word:
    """What each rank says of itself."""

    node: str
    host_bytes: int  # of its arena; 0 where that is on a GPU
    can_share: bool
    layouts: Mapping[str, TensorLayout] | None  # of a live model; what a spec says everybody knows


@dataclass(frozen=True)
class Neighbours:
    """The ranks of this node, by world rank, ascending."""

    world_rank: int
    words: Mapping[int, _Word]
    spec: SpecLayout | None

    def share(self, job: Job, plan: LoadPlan) -> SharedPlan | None:
        """This rank's part of the node's reads; None where every rank reads for itself."""
        if len(self.words) < 2 or not all(word.can_share for word in self.words.values()):
            return None
        shared = share_reads(plan, job.catalog, self._wants(), max_slab_bytes=MAX_SLAB_BYTES)
        return shared

    def _wants(self) -> Wants:
        if self.spec is not None:
            return SpecWants(self.spec, list(self.words))
        return ToldWants({rank: word.layouts or {} for rank, word in self.words.items()})

    def allocate(self, job: Job, plan: LoadPlan) -> Arena:
        """An arena for this rank. Raises ArenaError where the host has no room for all of its ranks' arenas."""
        sizes = [word.host_bytes for word in self.words.values()]
        check_host_room(arenas_bytes=sum(sizes), num_arenas=len(sizes), host=socket.gethostname())
        return arena_for(plan, job.catalog, job.device)

    def addresses(
        self, arena: Arena, plan: LoadPlan, catalog: Catalog, agreement: Agreement
    ) -> dict[int, ArenaAddress]:
        """Where the neighbours' arenas are, after each rank has written where its tensors begin."""

        def publish() -> ArenaAddress | None:
            if not isinstance(arena, HostArena):
                return None
            rows = rows_of(catalog)
            for tensor in plan.tensors:
                arena.directory[rows[tensor.key]] = tensor.arena_offset
            return ArenaAddress.of(arena)

        published = agreement.share("allocating the arena", publish)
        return {rank: address for rank in self.words if (address := published[rank]) is not None}


def meet_neighbours(job: Job, plan: LoadPlan, agreement: Agreement) -> Neighbours:
    """Hear of every rank where it runs and how much memory it will take; all ranks must call it."""
    spec = job.layout.spec
    wants_sharing = job.read.strategy != "direct" and job.device.type == "cpu"
    if spec is None and agreement.size > MAX_TOLD_RANKS:
        wants_sharing = False
    word = _Word(
        job.read.node or node_identity(),
        plan.arena_bytes if job.device.type == "cpu" else 0,
        wants_sharing,
        told(plan) if wants_sharing and spec is None and agreement.size > 1 else None,
    )
    words = agreement.share("planning", lambda: word)
    here = {rank: other for rank, other in enumerate(words) if other.node == word.node}
    return Neighbours(agreement.rank, here, spec)


def arena_for(plan: LoadPlan, catalog: Catalog, device: torch.device) -> Arena:
    """An arena with room for a plan, and with a directory of its tensors. Raises ArenaError."""
    return allocate_arena(plan.arena_bytes, device, num_places=len(catalog.tensors))


def rows_of(catalog: Catalog) -> dict[str, int]:
    """The catalog's tensors in order: the same on all ranks."""
    return {key: row for row, key in enumerate(catalog.tensors)}
