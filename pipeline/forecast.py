"""Foretell what each rank of a spec will read: from every rank's plan where ranks are few, else from plans of a sample.

Ranks of a node read for each other, so nodes are planned whole. Nodes whose ranks want the very same boxes (replicas) read
the same, and one of them is planned. Where there are too many kinds of nodes, some of them, evenly spaced, stand for their
neighbours: what a rank wants is known of each, what it reads is then taken to be in proportion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from schemas.plan_report import RankPlan
from schemas.stage_config import StageConfig
from shardferry.catalog import Catalog
from shardferry.checkpoint import storage_of
from shardferry.demand import Demand
from shardferry.errors import StorageError
from shardferry.extents import JoinLimits
from shardferry.neighbours import slab_bytes
from shardferry.plan import LoadPlan, plan_load
from shardferry.predict import predict_reads
from shardferry.probe import answers_from_memory
from shardferry.request import LoadRequest
from shardferry.sharing import SharedPlan, share_reads
from shardferry.spec_layout import SpecLayout
from shardferry.wants import SpecWants

USUAL_NODE = 8  # ranks
MOST_PLANNED = 64  # ranks; a plan of the largest models takes a third of a second


@dataclass(frozen=True, slots=True)
class Forecast:
    """What each rank will read, and how well that is known."""

    ranks: list[RankPlan]
    ranks_per_node: int
    ranks_planned: int
    estimated: bool  # for some rank from the plan of one that wants other boxes


@dataclass(frozen=True, slots=True)
class _Reads:
    """What one rank's plan asks of storage and of other ranks, in bytes; Python objects apart."""

    needed: int
    read: int
    sent: int
    received: int
    num_requests: int


def forecast(
    config: StageConfig,
    catalog: Catalog,
    layout: SpecLayout,
    demand: Demand,
    *,
    ranks_per_node: int | None = None,
    most_planned: int = MOST_PLANNED,
) -> Forecast:
    """Foretell all ranks' reads. Raises PlanError, LayoutError as `plan_load` does.

    Args:
        ranks_per_node: that read for each other; default: 8.
    """
    node_size = min(ranks_per_node or USUAL_NODE, layout.world_size)
    planner = _NodePlanner(config, catalog, layout, config.checkpoint.request())
    nodes = _Nodes.of(demand.twins, node_size if planner.may_share else 1)
    chosen = nodes.chosen(most_planned)
    reads = {node: planner.reads(nodes.ranks(node)) for node in chosen}
    sources = nodes.sources(chosen)
    ranks = []
    for rank in range(layout.world_size):
        node, place = divmod(rank, nodes.size)
        found = reads[sources[node]]
        ranks.append(_scaled(rank, demand, found[place % len(found)]))
    ranks[0] = _with_objects(ranks[0], planner.first)
    estimated = bool((nodes.kinds[sources] != nodes.kinds).any())
    return Forecast(ranks, node_size, sum(map(len, reads.values())), estimated)


def _scaled(rank: int, demand: Demand, like: _Reads) -> RankPlan:
    """A rank that reads as another does, in proportion to what both want."""
    needed = int(demand.needed[rank])
    ratio = needed / like.needed if like.needed else 1.0

    def scaled(count: int) -> int:
        return count if needed == like.needed else round(count * ratio)

    return RankPlan(
        rank=rank,
        bytes_needed=needed,
        bytes_read=scaled(like.read),
        bytes_sent=scaled(like.sent),
        bytes_received=scaled(like.received),
        num_requests=scaled(like.num_requests),
        arena_bytes=int(demand.arena[rank]),
    )


def _with_objects(rank: RankPlan, plan: LoadPlan) -> RankPlan:
    """Rank 0 reads the Python objects for all."""
    nbytes = sum(planned.nbytes for planned in plan.objects)
    return rank.model_copy(
        update={
            "bytes_needed": rank.bytes_needed + nbytes,
            "bytes_read": rank.bytes_read + nbytes,
            "num_requests": rank.num_requests + len(plan.objects),
        }
    )


@dataclass(frozen=True)
class _Nodes:
    """As many ranks to a node, in order; the last node may have fewer."""

    size: int
    world_size: int
    kinds: np.ndarray  # int64[num_nodes]: the lowest node whose ranks want the very same boxes

    @classmethod
    def of(cls, twins: np.ndarray, size: int) -> _Nodes:
        padded = np.full(-(-len(twins) // size) * size, -1, dtype=np.int64)
        padded[: len(twins)] = twins
        _, first, inverse = np.unique(padded.reshape(-1, size), axis=0, return_index=True, return_inverse=True)
        return cls(size, len(twins), first[inverse.reshape(-1)])

    def ranks(self, node: int) -> range:
        return range(node * self.size, min((node + 1) * self.size, self.world_size))

    def chosen(self, most_planned: int) -> list[int]:
        """The nodes to plan: one of each kind, or as many as may be, evenly spaced. Rank 0's is one of them."""
        kinds = np.unique(self.kinds)
        most = max(1, most_planned // self.size)
        if len(kinds) > most:
            kinds = kinds[np.linspace(0, len(kinds) - 1, most).astype(np.int64)]
        return kinds.tolist()  # type: ignore[no-any-return]

    def sources(self, chosen: Sequence[int]) -> np.ndarray:
        """For each node the one whose plan stands for it: of its kind, else the nearest before it."""
        places = np.searchsorted(chosen, self.kinds, side="right") - 1
        return np.array(chosen, dtype=np.int64)[places]


class _NodePlanner:
    """Plans the ranks of one node as they will plan themselves."""

    def __init__(self, config: StageConfig, catalog: Catalog, layout: SpecLayout, request: LoadRequest) -> None:
        self._config = config
        self._catalog = catalog
        self._layout = layout
        self._request = request
        self._limits = _limits(config, catalog)
        self._slab_bytes = slab_bytes(catalog)
        self.first = plan_load(catalog, layout.rank(0), request)

    @property
    def may_share(self) -> bool:
        return self._config.read.strategy != "direct" and self._config.actors.device != "cuda"

    def reads(self, ranks: Sequence[int]) -> list[_Reads]:
        """Of each rank of a node."""
        plans = [replace(self._plan(rank), objects=()) for rank in ranks]
        return [self._reads(plan, shared) for plan, shared in zip(plans, self._shared(plans), strict=True)]

    def _plan(self, rank: int) -> LoadPlan:
        return plan_load(self._catalog, self._layout.rank(rank), self._request) if rank else self.first

    def _shared(self, plans: Sequence[LoadPlan]) -> list[SharedPlan | None]:
        """Each rank's part of its node's reads; None where it reads for itself."""
        auto = self._config.read.strategy == "auto"
        if not self.may_share or len(plans) < 2 or (auto and self._all_in_memory(plans)):
            return [None] * len(plans)
        wants = SpecWants(self._layout, [plan.world_rank for plan in plans])
        return [share_reads(plan, self._catalog, wants, max_slab_bytes=self._slab_bytes) for plan in plans]

    def _all_in_memory(self, plans: Sequence[LoadPlan]) -> bool:
        """Where the files are not here, they are not in this machine's memory either."""
        storage = storage_of(self._catalog)
        try:
            return all(answers_from_memory(plan, self._catalog, storage) for plan in plans)
        except StorageError:
            return False
        finally:
            storage.close()

    def _reads(self, plan: LoadPlan, shared: SharedPlan | None) -> _Reads:
        nbytes, num_requests = predict_reads(plan, self._catalog, self._limits, shared)
        sent, received = (0, 0) if shared is None else (shared.bytes_sent, shared.bytes_received)
        return _Reads(plan.bytes_needed, nbytes, sent, received, num_requests)


def _limits(config: StageConfig, catalog: Catalog) -> JoinLimits:
    options, storage = config.read.options(config.timeouts.load_s), storage_of(catalog)
    try:
        return JoinLimits.of(
            storage.traits, max_gap_bytes=options.max_gap_bytes, max_request_bytes=options.max_request_bytes
        )
    finally:
        storage.close()
