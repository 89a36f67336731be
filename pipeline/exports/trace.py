"""Turn a stage's report into a Chrome trace, for Perfetto (ui.perfetto.dev) or chrome://tracing."""

from __future__ import annotations

import json
from typing import Any

from shardferry.pipeline.exports.timeline import Row, timeline
from shardferry.schemas.stage_report import StageReport


def chrome_trace(report: StageReport) -> str:
    """JSON in microseconds: a process for the driver and for each node, a thread for each rank, a slice for each phase."""
    rows = timeline(report)
    pids = {process: pid for pid, process in enumerate(dict.fromkeys(row.process for row in rows), start=1)}
    events: list[dict[str, Any]] = []
    for process, pid in pids.items():
        name = process if process == "driver" else f"node {process}"
        events += [_named("process_name", pid, 0, name=name), _named("process_sort_index", pid, 0, sort_index=pid)]
    for row in rows:
        events += _events_of(row, pids[row.process])
    content = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"location": report.location}}
    return json.dumps(content)


def _events_of(row: Row, pid: int) -> list[dict[str, Any]]:
    tid = 0 if row.rank is None else row.rank
    names = [_named("thread_name", pid, tid, name=row.name), _named("thread_sort_index", pid, tid, sort_index=tid)]
    slices = [
        {
            "name": span.name,
            "ph": "X",
            "pid": pid,
            "tid": tid,
            "ts": span.start * 1e6,
            "dur": (span.end - span.start) * 1e6,
        }
        for span in row.spans
    ]
    return names + slices


def _named(event: str, pid: int, tid: int, **arguments: Any) -> dict[str, Any]:
    """A metadata event, which names or sorts a process or a thread."""
    return {"name": event, "ph": "M", "pid": pid, "tid": tid, "args": arguments}
