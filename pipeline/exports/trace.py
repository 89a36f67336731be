"""Turn a stage's report into a Chrome trace, for Perfetto (ui.perfetto.dev) or chrome://tracing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from shardferry.pipeline.exports.timeline import Row, first_start, timeline
from shardferry.schemas.stage_report import RankReport, StageReport
from shardferry.stats import StorageRequest

_STEPS = 200  # of the counters, over the time of all requests
_LANES = (
    1_000  # thread numbers of a rank: its own, those of its requests, and from `_WORK` on those of its kinds of work
)
_WORK = 900


def chrome_trace(report: StageReport) -> str:
    """JSON in microseconds.

    A process for the driver and for each node, a thread for each rank, a slice for each phase. Each kind of work in the phase
    "read" has a thread of its own, and so have requests that overlap. A node's counters are its bytes per second and its requests in flight.
    """
    rows = timeline(report)
    pids = {process: pid for pid, process in enumerate(dict.fromkeys(row.process for row in rows), start=1)}
    events: list[dict[str, Any]] = []
    for process, pid in pids.items():
        name = process if process == "driver" else f"node {process}"
        events += [_named("process_name", pid, 0, name=name), _named("process_sort_index", pid, 0, sort_index=pid)]
    for row in rows:
        events += _events_of(row, pids[row.process])
    origin = first_start(report)
    for rank in report.ranks:
        events += _request_slices(rank, pids[rank.node], origin)
    for node in dict.fromkeys(rank.node for rank in report.ranks):
        events += _counters([rank for rank in report.ranks if rank.node == node], pids[node], origin)
    content = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"location": report.location}}
    return json.dumps(content)


def _events_of(row: Row, pid: int) -> list[dict[str, Any]]:
    tid = 0 if row.rank is None else row.rank * _LANES
    events = _thread(pid, tid, row.name) + [_slice(span.name, pid, tid, span.start, span.end) for span in row.spans]
    for lane, span in enumerate(row.work, start=tid + _WORK):
        work = _slice(span.name, pid, lane, span.start, span.end)
        busy = {"busy seconds": row.busy.get(span.name, 0.0)}
        events += [*_thread(pid, lane, f"{row.name}, {span.name}"), {**work, "args": busy}]
    return events


def _request_slices(rank: RankReport, pid: int, origin: float) -> Iterator[dict[str, Any]]:
    """Slices of one thread don't overlap: a request goes to the first thread that is free."""
    free_at: list[float] = []
    for request in sorted(rank.requests, key=lambda request: request.start):
        start, end = request.start - origin, request.start + request.seconds - origin
        lane = next((lane for lane, free in enumerate(free_at) if free <= start), len(free_at))
        tid = rank.rank * _LANES + 1 + lane
        if lane == len(free_at):
            free_at.append(end)
            yield from _thread(pid, tid, f"rank {rank.rank}, requests {lane}")
        free_at[lane] = end
        name = f"{request.path}, {request.nbytes:,} bytes"
        yield {**_slice(name, pid, tid, start, end), "args": {"file": request.path, "bytes": request.nbytes}}


def _counters(ranks: Sequence[RankReport], pid: int, origin: float) -> Iterator[dict[str, Any]]:
    """Bytes of a request are spread over its time. Where a rank kept some of its requests only, each stands for several."""
    requests = [(request, rank.num_requests / len(rank.requests)) for rank in ranks for request in rank.requests]
    if not requests:
        return
    begin = min(request.start for request, _ in requests)
    step_s = max((max(r.start + r.seconds for r, _ in requests) - begin) / _STEPS, 1e-6)
    rates, in_flight = [0.0] * (_STEPS + 1), [0.0] * (_STEPS + 1)
    for request, weight in requests:
        for step, seconds in _steps_of(request, begin, step_s):
            share = seconds / request.seconds if request.seconds else 1.0
            rates[step] += weight * request.nbytes * share / step_s
            in_flight[step] += weight * seconds / step_s
    for step in range(_STEPS + 1):
        at = {"ph": "C", "pid": pid, "tid": 0, "ts": (begin - origin + step * step_s) * 1e6}
        yield {**at, "name": "bytes per second", "args": {"bytes/s": round(rates[step])}}
        yield {**at, "name": "requests in flight", "args": {"requests": round(in_flight[step], 2)}}


def _steps_of(request: StorageRequest, begin: float, step_s: float) -> Iterator[tuple[int, float]]:
    """The steps in which a request was in flight, each with the seconds of it."""
    start, end = request.start - begin, request.start + request.seconds - begin
    for step in range(min(int(start / step_s), _STEPS), min(int(end / step_s), _STEPS) + 1):
        yield step, max(0.0, min(end, (step + 1) * step_s) - max(start, step * step_s))


def _thread(pid: int, tid: int, name: str) -> list[dict[str, Any]]:
    return [_named("thread_name", pid, tid, name=name), _named("thread_sort_index", pid, tid, sort_index=tid)]


def _slice(name: str, pid: int, tid: int, start: float, end: float) -> dict[str, Any]:
    return {"name": name, "ph": "X", "pid": pid, "tid": tid, "ts": start * 1e6, "dur": (end - start) * 1e6}


def _named(event: str, pid: int, tid: int, **arguments: Any) -> dict[str, Any]:
    """A metadata event, which names or sorts a process or a thread."""
    return {"name": event, "ph": "M", "pid": pid, "tid": tid, "args": arguments}
