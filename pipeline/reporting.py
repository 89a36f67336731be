"""Put the ranks' reports together into the stage's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from pipeline.planning import amplification, unique_bytes
from schemas.stage_config import StageConfig
from schemas.stage_report import RankReport, StageReport
from shardferry.catalog import Catalog
from shardferry.layout import RankLayout
from shardferry.load import read_values


def build_report(
    config: StageConfig,
    catalog: Catalog,
    layouts: Sequence[RankLayout],
    ranks: Sequence[RankReport],
    driver_phases: dict[str, float],
) -> StageReport:
    """The whole stage's report."""
    request = config.checkpoint.request()
    # Only with its param groups is a live optimizer's plan the one that its loader made.
    values = None if config.topology is not None else read_values(catalog, request)
    unique = unique_bytes(catalog, layouts, request, values)
    read = sum(rank.bytes_read for rank in ranks)
    phases = driver_phases | _slowest(ranks)
    planning = phases.get("catalog", 0.0) + phases.get("plan", 0.0)
    bound = lower_bound_s(config, unique, ranks) + planning
    reached = planning + phases.get("allocate", 0.0) + phases.get("read", 0.0)
    return StageReport(
        location=catalog.location,
        optimizer_key=config.checkpoint.optimizer_key,
        world_size=len(ranks),
        strategy=", ".join(sorted({rank.strategy for rank in ranks})),
        strategy_reason="; ".join(sorted({rank.strategy_reason for rank in ranks})),
        unique_bytes_needed=unique,
        storage_bytes_read=read,
        read_amplification=amplification(read, unique),
        num_requests=sum(rank.num_requests for rank in ranks),
        missing=sorted({fqn for rank in ranks for fqn in rank.missing}),
        unexpected=sorted({fqn for rank in ranks for fqn in rank.unexpected}),
        phases=phases,
        lower_bound_s=bound,
        ratio_to_lower_bound=reached / bound if bound else 1.0,
        ranks=list(ranks),
    )


def _slowest(ranks: Sequence[RankReport]) -> dict[str, float]:
    phases: dict[str, float] = {}
    for rank in ranks:
        for name, seconds in rank.phases.items():
            phases[name] = max(phases.get(name, 0.0), seconds)
    return phases


def lower_bound_s(config: StageConfig, unique: int, ranks: Sequence[RankReport]) -> float:
    """No load can be faster than storage gives the unique bytes, nor than a node's memory takes its ranks' bytes.

    The storage's bandwidth counts where the spec states it; the memory's was measured by the ranks.
    """
    storage = unique / config.read.storage_bandwidth if config.read.storage_bandwidth else 0.0
    needed: dict[str, int] = defaultdict(int)
    bandwidth: dict[str, float] = defaultdict(float)
    for rank in ranks:
        needed[rank.node] += rank.bytes_needed
        bandwidth[rank.node] += rank.host_copy_bandwidth
    return max([storage, *(needed[node] / bandwidth[node] for node in needed)])
