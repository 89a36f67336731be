"""Decide whether ranks read for each other, and which ranks do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shardferry.checkpoint.catalog import Catalog
from shardferry.config import SplitLimits, Strategy
from shardferry.exchange.rank_info import RankInfo
from shardferry.layout.rank_layout import RankLayout
from shardferry.layout.spec import spec_of
from shardferry.plan.cooperative import CooperativePlan, RankLayouts, assign_reads
from shardferry.plan.load_plan import LoadPlan
from shardferry.plan.rank_layouts import ExchangedLayouts, LayoutsFromSpec


@dataclass(frozen=True, slots=True)
class ChosenStrategy:
    """Who reads what, and why."""

    name: Literal["direct", "cooperative"]
    reason: str
    plan: CooperativePlan | None = None  # of cooperative reads


def choose_strategy(
    ranks: Sequence[RankInfo], *, world_rank: int, asked: Strategy, is_local: bool, is_connected: bool
) -> ChosenStrategy:
    """The strategy of a load, without a plan. Every rank finds the same name.

    ``auto`` reads directly where all ranks find local files on one node: the page cache gives to all of them what one has read.
    Everywhere else ranks that can reach each other read each byte once.

    Args:
        ranks: by world rank.
        is_local: the files are in a directory.
        is_connected: the process group carries host memory between memory groups.
    """
    because = next((rank.direct_because for rank in ranks if rank.direct_because), "")
    if not because and asked == "auto" and is_local and len({rank.node for rank in ranks}) == 1:
        because = "all ranks read local files on one node, whose page cache serves every rank after the first read"
    if because:
        return ChosenStrategy("direct", because)
    members = companions(ranks, world_rank=world_rank, is_connected=is_connected)
    if len(members) < 2:
        return ChosenStrategy(
            "direct", "no other rank shares memory with this one, and the process group carries no host memory"
        )
    num_groups = len({rank.memory_group for rank in ranks})
    where = "on this node share memory" if num_groups == 1 else f"in {num_groups} memory groups"
    return ChosenStrategy("cooperative", f"{len(members)} ranks {where}: each byte leaves storage once")


def companions(ranks: Sequence[RankInfo], *, world_rank: int, is_connected: bool) -> list[int]:
    """The world ranks that read for each other with this one, itself among them."""
    if is_connected:
        return list(range(len(ranks)))
    own = ranks[world_rank].memory_group
    return [rank for rank, info in enumerate(ranks) if info.memory_group == own]


def plan_cooperation(
    plan: LoadPlan,
    catalog: Catalog,
    layout: RankLayout,
    ranks: Sequence[RankInfo],
    *,
    is_connected: bool,
    limits: SplitLimits,
) -> CooperativePlan:
    """This rank's part of the reads. Every rank computes its own, from the same facts."""
    members = companions(ranks, world_rank=plan.world_rank, is_connected=is_connected)
    layouts: RankLayouts
    spec = spec_of(layout)
    if spec is not None:
        layouts = LayoutsFromSpec(spec, members)
    else:
        layouts = ExchangedLayouts({rank: ranks[rank].layouts or {} for rank in members})
    memory_groups = {rank: info.memory_group for rank, info in enumerate(ranks)}
    return assign_reads(plan, catalog, layouts, limits=limits, memory_groups=memory_groups)
