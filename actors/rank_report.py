"""A rank's report: what its load has counted, and what its process measures of itself."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import ray
import torch

from shardferry.load import LoadFigures
from shardferry.schemas.stage_report import RankReport, Span

_REQUESTS_KEPT = 10_000  # of all ranks, one by one, for the trace


def requests_kept(world_size: int) -> int:
    """How many requests of one rank's load are kept for the trace."""
    return max(16, _REQUESTS_KEPT // world_size)


def measures_of_this_process(device: str) -> dict[str, Any]:
    """The fields of a `RankReport` that the process itself knows.

    Args:
        device: of the arena.
    """
    on_gpu = torch.device(device).type == "cuda"
    return {
        "node": ray.util.get_node_ip_address(),
        "gpu_ids": [str(gpu) for gpu in ray.get_gpu_ids()],
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "host_copy_bandwidth": copy_bandwidth(torch.device("cpu")),
        "device_copy_bandwidth": copy_bandwidth(torch.device(device)) if on_gpu else None,
    }


def rank_report(
    figures: LoadFigures,
    measures: Mapping[str, Any],
    *,
    rank: int,
    transport: str,
    before: Sequence[Span],
    load_start: float,
) -> RankReport:
    """The report of one rank.

    Args:
        measures: see `measures_of_this_process`.
        before: the phases of the process before the load.
        load_start: seconds since the epoch.
    """
    counted = {f.name: getattr(figures, f.name) for f in fields(LoadFigures) if f.name != "seconds"}
    spans, start = list(before), load_start
    for name, seconds in figures.seconds.items():
        spans.append(Span(name=name, start=start, end=start + seconds))
        start += seconds
    spans.append(Span(name="load", start=load_start, end=start))  # around its phases
    return RankReport(
        **counted,
        **measures,
        rank=rank,
        transport=transport,
        phases={**{span.name: span.end - span.start for span in before}, **figures.seconds},
        spans=spans,
    )


def copy_bandwidth(device: torch.device, nbytes: int = 16 * 1024 * 1024) -> float:
    """Bytes per second of a copy from host memory to a device, measured now: the best of three copies.

    Args:
        device: a GPU, or ``cpu`` for copies within host memory.
        nbytes: of each copy.
    """
    on_gpu = device.type == "cuda"
    source = torch.ones(nbytes, dtype=torch.uint8, pin_memory=on_gpu)
    target = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        target.copy_(source)  # a copy to a GPU, too, is complete when this returns
        best = max(best, nbytes / (time.perf_counter() - start))
    return best
