"""Meet the other ranks, make room for the arenas of a node, and decide whether ranks read for each other."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import numpy as np
import torch

from shardferry.arena import Arena, HostArena, available_host_bytes, check_host_room
from shardferry.checkpoint.catalog import Catalog
from shardferry.exchange.agreement import Agreement
from shardferry.exchange.peer_memory import ArenaAddress
from shardferry.handoff.handle import node_identity
from shardferry.layout.spec import SpecLayout
from shardferry.layout.tensor_layout import RankLayout, TensorLayout
from shardferry.plan.cooperative import SharedPlan, share_reads
from shardferry.plan.costs import RankCosts, Work, compare
from shardferry.plan.plan_sample import PlanSample
from shardferry.plan.planner import LoadPlan
from shardferry.plan.probe import measure_rates
from shardferry.plan.rank_layouts import SpecWants, ToldWants, Wants, told
from shardferry.plan.split import SlabLimits
from shardferry.read.execute import Counters, ReadOptions, join_limits_of
from shardferry.storage.base import RangeReader

_DIRECT_READS = 256  # of which is foretold what a rank would ask of storage by itself
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
class Word:
    """What each rank says of itself."""

    node: str
    island: str  # ranks that say the same can write into each other's arenas
    host: str
    host_bytes: int  # that its arena will take of the host's memory
    available_bytes: int  # of the host's memory
    address: ArenaAddress | None  # of its arena, where that is on the host
    alone_because: str  # why it reads for itself; empty where it can read with others
    shares_reads: bool  # what one rank of a node has read, the others find in memory
    layouts: Mapping[str, TensorLayout] | None  # of a live model; what a spec says everybody knows
    taken: bytes  # a bit for each saved name, in the order that all ranks have: whether this rank takes it


@dataclass(frozen=True)
class Neighbours:
    """All ranks of the job, and what this one can do with them."""

    world_rank: int
    words: Sequence[Word]  # by world rank
    spec: SpecLayout | None
    is_connected: bool  # the process group carries host memory from island to island

    @classmethod
    def of(cls, job: Job, words: Sequence[Word], agreement: Agreement) -> Self:
        """From every rank's word."""
        return cls(agreement.rank, words, job.layout.spec, agreement.host_group is not None)

    @property
    def islands(self) -> dict[int, str]:
        """By world rank; see shardferry/plan/cooperative.py."""
        return {rank: word.island for rank, word in enumerate(self.words)}

    @property
    def addresses(self) -> dict[int, ArenaAddress]:
        """Where the arenas of this rank's island are."""
        found = {rank: self.words[rank].address for rank in self._island()}
        return {rank: address for rank, address in found.items() if address is not None}

    def strategy(
        self, job: Job, plan: LoadPlan, storage: RangeReader, agreement: Agreement, counters: Counters
    ) -> Strategy:
        """Whether ranks read for each other, and this rank's part. All of them must call it, and find the same.

        Args:
            counters: of what is asked of storage to learn how quick it is.
        """
        companions = list(range(len(self.words))) if self.is_connected else self._island()
        because = next((word.alone_because for word in self.words if word.alone_because), "")
        if not because and job.read.strategy == "auto":
            because = self._nothing_to_gain()
        if because:
            return Strategy("direct", because)
        slabs = _slab_limits(job, storage)
        shared: SharedPlan | None = None
        if job.read.strategy == "auto":
            sample = PlanSample.of(plan)
            sampled = self._shared_of(sample, job, companions, slabs)
            costs = agreement.share("planning", lambda: self._costs(job, plan, sample, sampled, storage, counters))
            choice = compare(costs)
            if not choice.is_cooperative:
                return Strategy("direct", choice.reason)
            because = choice.reason
            shared = sampled if sample.is_whole else None
        if len(companions) < 2:
            return Strategy("direct", "no other rank shares memory with this one, and the process group carries none")
        num_islands = len(set(self.islands.values()))
        where = "on this node share memory" if num_islands == 1 else f"on {num_islands} islands of shared memory"
        if shared is None:
            shared = self._shared(job, plan, companions, slabs)
        return Strategy("cooperative", f"{len(companions)} ranks {where}" + (because and f"; {because}"), shared)

    def _nothing_to_gain(self) -> str:
        """Why reading for each other can't be quicker, whatever the storage gives."""
        if all(word.shares_reads for word in self.words) and len({word.node for word in self.words}) == 1:
            return "all ranks are on one node, whose page cache gives to all of them what one has read"
        return ""

    def _island(self) -> list[int]:
        island = self.words[self.world_rank].island
        return [rank for rank, word in enumerate(self.words) if word.island == island]

    def _shared(self, job: Job, plan: LoadPlan, world_ranks: list[int], slabs: SlabLimits) -> SharedPlan:
        wants = self._wants(world_ranks)
        return share_reads(plan, job.catalog, wants, slabs=slabs, islands=self.islands)

    def _shared_of(self, sample: PlanSample, job: Job, world_ranks: list[int], slabs: SlabLimits) -> SharedPlan:
        if sample.is_whole:
            return self._shared(job, sample.plan, world_ranks, slabs)
        return share_reads(sample.plan, job.catalog, self._wants(world_ranks), slabs=slabs, islands=self.islands)

    def _wants(self, world_ranks: list[int]) -> Wants:
        if self.spec is not None:
            return SpecWants(self.spec, world_ranks)
        return ToldWants({rank: self.words[rank].layouts or {} for rank in world_ranks})

    def _costs(
        self,
        job: Job,
        plan: LoadPlan,
        sample: PlanSample,
        shared: SharedPlan,
        storage: RangeReader,
        counters: Counters,
    ) -> RankCosts:
        """Of the plan, by a sample of it, and the sample's part in shared reads."""
        word, limits = self.words[self.world_rank], join_limits_of(storage.traits, job.read)
        direct = from_storage = Work.of(PlanSample.of_reads(plan, _DIRECT_READS), job.catalog, limits)
        rates = measure_rates(plan, job.catalog, storage, counters)
        if rates.shares_reads:  # what a node's ranks read, its page cache gives to all of them
            on_this_node = [rank for rank, other in enumerate(self.words) if other.node == word.node]
            is_all = len(on_this_node) == len(self.words)
            in_node = shared if is_all else self._shared_of(sample, job, on_this_node, _slab_limits(job, storage))
            from_storage = Work.of(sample, job.catalog, limits, in_node)
        return RankCosts(
            direct=direct,
            direct_from_storage=from_storage,
            cooperative=Work.of(sample, job.catalog, limits, shared),
            rates=rates,
            concurrency=job.read.concurrency,
        )

    def check_room(self) -> None:
        """Raises ArenaError where a host has no room for all of its ranks' arenas. All ranks find the same."""
        for node in dict.fromkeys(word.node for word in self.words):
            words = [word for word in self.words if word.node == node]
            check_host_room(
                [word.host_bytes for word in words if word.host_bytes],
                available_bytes=min(word.available_bytes for word in words),
                host=words[0].host,
            )


def _slab_limits(job: Job, storage: RangeReader) -> SlabLimits:
    return SlabLimits.of(storage.traits, join_limits_of(storage.traits, job.read))


def word_of(
    job: Job, plan: LoadPlan, arena: Arena, storage: RangeReader, agreement: Agreement, *, is_new: bool = True
) -> Word:
    """What this rank tells the others.

    Args:
        is_new: the arena, which therefore has no memory yet.

    Raises:
        StorageError: a file that the plan reads is missing.
    """
    node, on_host = job.read.node or node_identity(), isinstance(arena, HostArena)
    because = _alone_because(job, agreement)
    asks = not because and job.read.strategy == "auto"
    return Word(
        node=node,
        island=node if on_host else f"{node}, rank {agreement.rank}",
        host=socket.gethostname(),
        host_bytes=plan.arena_bytes if on_host and is_new else 0,
        available_bytes=available_host_bytes(),
        address=ArenaAddress.of(arena) if isinstance(arena, HostArena) else None,
        alone_because=because,
        shares_reads=asks and storage.traits.is_local,
        layouts=told(plan) if not because and job.layout.spec is None else None,
        taken=np.packbits(np.array([*plan.state_claims.taken, *plan.weight_claims.taken], dtype=bool)).tobytes(),
    )


def taken_by_any(words: Sequence[Word], num_names: int) -> list[bool]:
    """Of each saved name, whether some rank takes it."""
    bits = np.bitwise_or.reduce([np.frombuffer(word.taken, dtype=np.uint8) for word in words])
    return np.unpackbits(bits, count=num_names).astype(bool).tolist()


def _alone_because(job: Job, agreement: Agreement) -> str:
    if job.read.strategy == "direct":
        return "read.strategy is direct"
    if agreement.size < 2:
        return "there is no other rank"
    if job.device.type != "cpu" and agreement.host_group is None:
        return "arenas are on GPUs, and the process group carries no host memory: it has no gloo beside its NCCL"
    if job.layout.spec is None and agreement.size > MAX_TOLD_RANKS:
        return f"of more than {MAX_TOLD_RANKS} live models each rank knows its own alone"
    return ""
