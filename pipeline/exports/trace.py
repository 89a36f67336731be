"""Write a stage's report as a Chrome trace or as an HTML page."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from typing import Any

from shardferry.schemas.stage_report import StageReport, what_is_loaded


def chrome_trace(report: StageReport) -> str:
    """The phases of all ranks as JSON for chrome://tracing or Perfetto: one row per rank, in microseconds."""
    spans = [(rank, span) for rank in report.ranks for span in rank.spans]
    origin = min((span.start for _, span in spans), default=0.0)
    events: list[dict[str, Any]] = [
        {
            "name": span.name,
            "ph": "X",
            "pid": rank.node,
            "tid": rank.rank,
            "ts": (span.start - origin) * 1e6,
            "dur": (span.end - span.start) * 1e6,
        }
        for rank, span in spans
    ]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def html_page(report: StageReport) -> str:
    """A self-contained page: the report's totals as a table, and the phases of each rank as bars."""
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in _totals(report)
    )
    title = html.escape(f"{report.location}: {what_is_loaded(report.optimizer_key)}")
    return _PAGE.format(title=title, rows=rows, bars="".join(_bars(report)))


def _totals(report: StageReport) -> Iterator[tuple[str, str]]:
    """Name and text of each number and string of the report, and of each entry of its dicts, which are seconds."""
    for name, value in report:
        label = name.removesuffix("_s").replace("_", " ") + (", s" if name.endswith("_s") else "")
        if isinstance(value, dict):
            yield from ((f"{label}: {part}, s", f"{seconds:.4f}") for part, seconds in value.items())
        elif isinstance(value, float):
            yield label, f"{value:.4f}"
        elif not isinstance(value, list):  # lists are per rank, or FQNs
            yield label, str(value)


def _bars(report: StageReport) -> list[str]:
    spans = [span for rank in report.ranks for span in rank.spans]
    if not spans:
        return []
    origin, end = min(s.start for s in spans), max(s.end for s in spans)
    scale = 100 / max(end - origin, 1e-9)
    lines = []
    for rank in report.ranks:
        bars = "".join(
            f'<i class="{html.escape(span.name)}" style="left:{(span.start - origin) * scale:.3f}%;'
            f'width:{max((span.end - span.start) * scale, 0.1):.3f}%" title="{html.escape(span.name)}: '
            f'{span.end - span.start:.4f} s"></i>'
            for span in rank.spans
            if span.name != "load"
        )
        lines.append(f"<div><b>rank {rank.rank}</b><span>{bars}</span></div>")
    return lines


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body{{font:15px system-ui,sans-serif;margin:2em;max-width:70em}} th{{text-align:left;padding-right:2em;font-weight:normal}}
td{{text-align:right;font-variant-numeric:tabular-nums}} div{{display:flex;margin:2px 0}} b{{width:5em;font-weight:normal}}
span{{position:relative;flex:1;height:1.3em;background:#eee}} i{{position:absolute;top:0;bottom:0;background:#999}}
i.read{{background:#2a7}} i.plan{{background:#37c}} i.allocate{{background:#c73}} i.join{{background:#a5c}}
</style></head><body><h1>{title}</h1><table>{rows}</table><h2>Phases</h2>{bars}
<p>Blue: plan. Orange: allocate. Green: read. Violet: join. Hover for seconds.</p></body></html>
"""
