"""Combine the ranks' reports into the stage's report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from shardferry.checkpoint.catalog import Catalog
from shardferry.checkpoint.open import opened_storage
from shardferry.config import LoadRequest
from shardferry.errors import MissingFile
from shardferry.layout.live import LiveLayout
from shardferry.load import read_values
from shardferry.pipeline.dry_run.demand import read_amplification, unique_bytes
from shardferry.pipeline.exports.timeline import total_s
from shardferry.pipeline.inspect import saved_topology
from shardferry.pipeline.versions import made_by
from shardferry.receiver import WantedPart
from shardferry.schemas.stage_config import StageConfig
from shardferry.schemas.stage_report import RankReport, Span, StageReport


def build_report(
    config: StageConfig,
    catalog: Catalog,
    parts: Sequence[Sequence[WantedPart]],
    ranks: Sequence[RankReport],
    driver_phases: dict[str, float],
) -> StageReport:
    """Build the report of a whole stage.

    Args:
        parts: by rank: what was loaded one after the other.
        ranks: by rank.
        driver_phases: seconds of the driver's phases, by name.
    """
    unique = sum(_unique(config, catalog, [rank[place] for rank in parts]) for place in range(len(parts[0])))
    read = sum(rank.bytes_read for rank in ranks)
    phases = driver_phases | _longest(rank.phases for rank in ranks)
    planning = phases.get("catalog", 0.0) + phases.get("plan", 0.0)
    terms = lower_bound_terms(config, unique, ranks)
    # The ranks can only be held against a limit that they may have met: that of the storage has to be known.
    bound = max(terms.values()) + planning if "storage" in terms else None
    reached = planning + sum(phases.get(name, 0.0) for name in ("allocate", "agree", "read"))
    report = StageReport(
        location=catalog.location,
        model_location=catalog.model_location or None,
        optimizer_key=config.checkpoint.optimizer_key,
        world_size=len(ranks),
        strategy=", ".join(sorted({rank.strategy for rank in ranks})),
        strategy_reason="; ".join(sorted({rank.strategy_reason for rank in ranks})),
        unique_bytes_needed=unique,
        storage_bytes_read=read,
        read_amplification=read_amplification(read, unique),
        num_requests=sum(rank.num_requests for rank in ranks),
        num_retries=sum(rank.num_retries for rank in ranks),
        missing=sorted({fqn for rank in ranks for fqn in rank.missing}),
        unexpected=sorted({fqn for rank in ranks for fqn in rank.unexpected}),
        warnings=[catalog.stale] if catalog.stale else [],
        saved_as=saved_topology(catalog),
        mesh={} if config.topology is None else dict(config.topology.mesh),
        storage_bytes_per_s=storage_rate(ranks),
        phases=phases,
        busy=_longest(rank.busy for rank in ranks),
        lower_bound_s=bound,
        lower_bound_terms={} if bound is None else terms,
        ratio_to_lower_bound=reached / bound if bound else None,
        ranks=list(ranks),
        **made_by(),
    )
    return report.model_copy(update={"total_s": total_s(report)})


def storage_rate(ranks: Sequence[RankReport]) -> float | None:
    """Bytes per second that the storage gave to all ranks, while the busiest one had requests in flight.

    None: nothing was read.
    """
    read = sum(rank.bytes_read for rank in ranks)
    busy_s = max((rank.busy.get("storage", 0.0) for rank in ranks), default=0.0)
    return read / busy_s if read and busy_s else None


def _unique(config: StageConfig, catalog: Catalog, wanted: Sequence[WantedPart]) -> int:
    """Bytes of one part that at least one rank needs, each counted once."""
    request = config.checkpoint.requests().of(wanted[0].optimizer_key, with_weights=wanted[0].with_weights)
    layouts = [part.layout for part in wanted]
    # The plan of a live optimizer depends on the saved param groups.
    is_live = any(isinstance(layout, LiveLayout) for layout in layouts)
    return unique_bytes(catalog, layouts, request, _values(catalog, request) if is_live else None)


def with_installs(ranks: Sequence[RankReport], receipts: Sequence[Any]) -> list[RankReport]:
    """The ranks' reports with the phase in which the trainer installed the shard, where the trainer told it."""
    found = list(ranks)
    for receipt in receipts:
        if isinstance(receipt, Mapping) and "installed_s" in receipt:
            (start, end), rank = receipt["installed_s"], found[receipt["world_rank"]]
            phases = {**rank.phases, "install": end - start}
            spans = [*rank.spans, Span(name="install", start=start, end=end)]
            found[rank.rank] = rank.model_copy(update={"phases": phases, "spans": spans})
    return found


def told_by_trainers(receipts: Sequence[Any]) -> dict[str, list[Any]]:
    """What the report lists of the trainers' answers: each entry once. A receiver of the user's own may answer anything."""
    told = [receipt for receipt in receipts if isinstance(receipt, Mapping)]
    names = ("missing_entries", "unexpected_entries", "overwritten", "warnings")
    return {name: sorted({entry for receipt in told for entry in receipt.get(name, ())}) for name in names}


def _values(catalog: Catalog, request: LoadRequest) -> dict[str, Any] | None:
    """None where this node lacks a file that others have."""
    with suppress(MissingFile), opened_storage(catalog) as storage:
        return read_values(catalog, request, storage)
    return None


def _longest(ranks: Iterable[Mapping[str, float]]) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for rank in ranks:
        for name, spent in rank.items():
            seconds[name] = max(seconds.get(name, 0.0), spent)
    return seconds


def lower_bound_terms(config: StageConfig, unique: int, ranks: Sequence[RankReport]) -> dict[str, float]:
    """Lower bounds of a load's seconds, by the resource that sets them.

    The rate of the storage is the spec's, else the one that the load itself saw. The bandwidths of the storage's link to a node and
    of the exchange between ranks count if the spec states them; the ranks have measured those of host memory and GPUs.

    Args:
        unique: bytes that at least one rank needs, each counted once.
        ranks: by rank.
    """
    of_nodes: dict[str, list[RankReport]] = defaultdict(list)
    for rank in ranks:
        of_nodes[rank.node].append(rank)
    read, terms = config.read, {"host memory": max(map(_memory_s, of_nodes.values()), default=0.0)}
    if rate := read.storage_bandwidth or storage_rate(ranks):
        terms["storage"] = unique / rate
    if read.node_bandwidth:
        terms["storage to a node"] = unique / (len(of_nodes) * read.node_bandwidth)
    if read.exchange_bandwidth:
        terms["exchange"] = sum(rank.bytes_forwarded for rank in ranks) / (len(ranks) * read.exchange_bandwidth)
    to_device = [rank.bytes_needed / rank.device_copy_bandwidth for rank in ranks if rank.device_copy_bandwidth]
    return terms | ({"device copy": max(to_device)} if to_device else {})


def _memory_s(node: Sequence[RankReport]) -> float:
    return sum(rank.bytes_needed for rank in node) / sum(rank.host_copy_bandwidth for rank in node)
