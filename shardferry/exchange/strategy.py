"""Decide whether ranks read for each other, and which ranks do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shardferry.checkpoint.catalog import Catalog
from shardferry.config import SplitLimits, Strategy
from shardferry.exchange.rank_info import RankInfo, spec_for_all
from shardferry.layout.rank_layout import RankLayout
from shardferry.plan.cooperative import CooperativePlan, RankLayouts, RanksOfFiles, assign_reads
from shardferry.plan.load_plan import LoadPlan
from shardferry.plan.rank_layouts import ExchangedLayouts, LayoutsFromSpec


@dataclass(frozen=True, slots=True)
class ChosenStrategy:
    """Who reads what, and why."""

    reason: str
    plan: CooperativePlan | None = None  # of cooperative reads; None: each rank reads for itself

    @property
    def name(self) -> Literal["direct", "cooperative"]:
        return "direct" if self.plan is None else "cooperative"


def choose_strategy(
    plan: LoadPlan,
    catalog: Catalog,
    layout: RankLayout,
    ranks: Sequence[RankInfo],
    *,
    asked: Strategy,
    is_local: bool,
    is_connected: bool,
    limits: SplitLimits,
    ranks_of_files: RanksOfFiles,
) -> ChosenStrategy:
    """The strategy of a load, with this rank's part of cooperative reads. Every rank computes its own, from the same facts.

    ``auto`` reads directly where all ranks find all files on one node: the page cache gives to all of them what one has read.
    Everywhere else ranks that can reach each other read each byte once.

    Args:
        ranks: by world rank.
        is_local: the files are in a directory.
        is_connected: the process group carries host memory between memory groups.
        limits: of the parts into which chunks are split.
        ranks_of_files: of the files that some ranks lack; then the plan has what others ask of this rank's files.
    """
    because = next((rank.direct_because for rank in ranks if rank.direct_because), "")
    on_one_node = is_local and not ranks_of_files and len({rank.node for rank in ranks}) == 1
    if not because and asked == "auto" and on_one_node:
        because = "all ranks read local files on one node, whose page cache serves every rank after the first read"
    if because:
        return ChosenStrategy(because)
    memory_groups = {rank: info.memory_group for rank, info in enumerate(ranks)}
    own = memory_groups[plan.world_rank]
    members = [rank for rank, group in memory_groups.items() if is_connected or group == own]
    if len(members) < 2:
        return ChosenStrategy("no other rank shares memory with this one, and the process group carries no host memory")
    num_groups = len(set(memory_groups.values()))
    where = "on this node share memory" if num_groups == 1 else f"in {num_groups} memory groups"
    spec = spec_for_all(layout, plan.request)
    layouts: RankLayouts
    if spec is not None:
        layouts = LayoutsFromSpec(spec, members)
    else:
        layouts = ExchangedLayouts({rank: ranks[rank].layouts or {} for rank in members})
    reason = f"{len(members)} ranks {where}: each byte leaves storage once"
    if ranks_of_files:
        reason += f"; {len(ranks_of_files)} files are not on all nodes, and are read by ranks that have them"
    shared = assign_reads(
        plan, catalog, layouts, limits=limits, memory_groups=memory_groups, ranks_of_files=ranks_of_files
    )
    return ChosenStrategy(reason, shared)
