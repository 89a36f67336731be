"""Reports of stages that never ran: of any number of ranks, with a clock of their own."""

from __future__ import annotations

from typing import Any

from shardferry.schemas.stage_report import FailedStage, RankProgress, RankReport, Span, StageReport
from shardferry.stats import Work

STARTED = 1_000.0  # seconds since the epoch
_PHASES = {"values": 0.25, "plan": 0.5, "allocate": 0.125, "agree": 0.125, "read": 8.0}


def rank_report(rank: int, **changes: Any) -> RankReport:
    """A rank that joins at 2 s, loads from 3 s to 12 s, and is installed at 13.5 s; the last two are later by as many hundredths as its rank."""
    slower = rank / 100
    phases = {**_PHASES, "read": _PHASES["read"] + slower}
    spans, start = [_span("join", 1.5, 2.0)], 3.0
    spans.append(_span("load", start, start + sum(phases.values())))
    for name, seconds in phases.items():
        spans.append(_span(name, start, start + seconds))
        start += seconds
    spans.append(_span("install", 12.5 + slower, 13.5 + slower))
    fields: dict[str, Any] = {
        "rank": rank,
        "node": f"10.0.0.{rank // 8}",
        "device": "cpu",
        "gpu_ids": [],
        "bytes_needed": 3_000_000_000,
        "bytes_read": 1_500_000_000,
        "bytes_sent": 700_000_000,
        "bytes_received": 800_000_000,
        "num_requests": 190,
        "arena_bytes": 3_000_000_000,
        "peak_rss_bytes": 4_000_000_000,
        "transport": "shared_memory",
        "strategy": "cooperative",
        "strategy_reason": "as asked",
        "host_copy_bandwidth": 1e10,
        "phases": {"join": 0.5, **phases, "install": 1.0},
        "busy": {"storage": 6.0, "deliver": 1.0, "exchange": 2.5, "device copy": 3.0},
        "work": [
            _work("storage", 4.0, 11.5),
            _work("deliver", 4.5, 11.75),
            _work("exchange", 5.0, 11.0),
            _work("device copy", 4.5, 12.0 + slower),
        ],
        "spans": spans,
        "file_bytes": {f"__{rank // 2}_0.distcp": 1_000_000_000, f"__{rank // 2 + 1}_0.distcp": 500_000_000},
    }
    return RankReport(**{**fields, **changes})


def stage_report(world_size: int, **changes: Any) -> StageReport:
    """The whole stage: it opens the checkpoint at -1 s, starts at 0 s, and hands over in 2 s."""
    ranks = [rank_report(rank) for rank in range(world_size)]
    fields: dict[str, Any] = {
        "location": "s3://bucket/run/step-1000",
        "optimizer_key": "optim",
        "world_size": world_size,
        "strategy": "cooperative",
        "strategy_reason": "as asked",
        "unique_bytes_needed": 1_500_000_000 * world_size,
        "storage_bytes_read": 1_500_000_000 * world_size,
        "read_amplification": 1.0,
        "num_requests": 190 * world_size,
        "saved_as": {"dim 0 in 4": 264, "whole": 2},
        "mesh": {"dp_shard": world_size},
        "total_s": 15.0,
        "storage_bytes_per_s": 250e6 * world_size,
        "phases": {"catalog": 1.0, "start": 2.0, **ranks[-1].phases, "handoff": 2.0},
        "lower_bound_s": 7.5,
        "lower_bound_terms": {"storage": 7.0, "host memory": 0.3},
        "ratio_to_lower_bound": 1.2,
        "versions": {"shardferry": "0.1.0"},
        "command": "shardferry run stage.yaml",
        "finished": "2026-01-01T00:00:00+00:00",
        "ranks": ranks,
    }
    return StageReport(**{**fields, **changes})


def failed_stage(world_size: int) -> FailedStage:
    """Rank 3 died, the others had half of their bytes."""
    return FailedStage(
        location="s3://bucket/run/step-1000",
        optimizer_key="optim",
        world_size=world_size,
        error="loading: the process of rank 3 died: <b>out of memory</b>",
        error_type="RankError",
        failed_ranks=[3],
        total_s=12.3,
        ranks=[
            RankProgress(
                rank=r,
                bytes_done=0 if r == 3 else 500_000_000,
                bytes_needed=10**9,
                phase="read",
                idle_s=9.5 if r == 3 else 0.5,
            )
            for r in range(world_size)
        ],
    )


def _work(kind: str, start: float, end: float) -> Work:
    return Work(kind, STARTED + start, STARTED + end)


def _span(name: str, start: float, end: float) -> Span:
    return Span(name=name, start=STARTED + start, end=STARTED + end)
