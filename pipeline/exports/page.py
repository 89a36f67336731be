"""Turn a stage's report, or that of a failed run, into an HTML page that needs nothing from elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape

from shardferry.pipeline.display import human_bytes, human_rate
from shardferry.pipeline.exports import charts
from shardferry.pipeline.exports.comparison import HEADER, compared
from shardferry.pipeline.exports.timeline import timeline
from shardferry.schemas.plan_report import PlanReport, max_over_mean
from shardferry.schemas.stage_report import FailedStage, StageReport, what_is_loaded

_MAX_NAMES = 50  # of a list of keys; the JSON has all
_MAX_BOXES = 8  # of a drawing, in each direction


def html_page(report: StageReport | FailedStage | PlanReport, other: StageReport | None = None) -> str:
    """The page: what was loaded, how long it took and why, the phases of all ranks, bytes, keys, and versions.

    Args:
        other: another run, for a comparison with a run that has succeeded.
    """
    title = f"{report.location}: {what_is_loaded(report.optimizer_key)} on {report.world_size} ranks"
    if isinstance(report, PlanReport):
        sections = _planned_sections(report)
    else:
        sections = _failed_sections(report) if isinstance(report, FailedStage) else _sections(report, other)
    body = "".join(f"<section><h2>{escape(name)}</h2>{content}</section>" for name, content in sections if content)
    return _PAGE.format(title=escape(title), policy=_POLICY, script=charts.script(), style=_STYLE, body=body)


def _sections(report: StageReport, other: StageReport | None) -> Iterator[tuple[str, str]]:
    yield "Summary", _cards(_summary(report)) + _warnings(report.warnings)
    if other is not None:
        yield "Beside another run", _table(HEADER, compared(report, other))
    mesh = " x ".join(f"{axis}={size}" for axis, size in report.mesh.items()) or f"{report.world_size} ranks"
    yield "Topology", _topology(report.saved_as, mesh, list(report.mesh.values()) or [report.world_size])
    yield "Phases" if other is None else "Phases of the first run", _timeline(report)
    if other is not None:
        yield "Phases of the second run", _timeline(other)
    yield "Seconds by rank and phase", charts.seconds_chart(report.ranks)
    yield "Bytes by rank", charts.bytes_chart(report.ranks)
    yield "Bytes by rank and file", charts.files_chart(report.ranks)
    yield "Lower bound", _lower_bound(report)
    yield "Keys", _keys(report)
    yield "Made by", _cards(_made_by(report))


def _failed_sections(failed: FailedStage) -> Iterator[tuple[str, str]]:
    yield "Failed", f'<p class="error"><b>{escape(failed.error_type)}</b> {escape(failed.error)}</p>'
    facts = {"seconds until it failed": f"{failed.total_s:.2f}"}
    if failed.failed_ranks:
        facts["ranks that failed"] = ", ".join(map(str, failed.failed_ranks[:_MAX_NAMES]))
    if failed.ranks:
        done, needed = (sum(getattr(r, name) for r in failed.ranks) for name in ("bytes_done", "bytes_needed"))
        facts["done"] = f"{human_bytes(done)} of {human_bytes(needed)}" if needed else "nothing: no rank had planned"
        phases = Counter(rank.phase or "not loading yet" for rank in failed.ranks)
        facts["ranks were last seen in"] = ", ".join(f"{phase} ({count})" for phase, count in phases.most_common())
        waiting = [rank for rank in failed.ranks if needed and rank.idle_s is not None]
        if waiting:
            stalled = max(waiting, key=lambda rank: rank.idle_s or 0.0)
            facts["longest without a byte"] = (
                f"rank {stalled.rank}, {stalled.idle_s:.1f} s, at {human_bytes(stalled.bytes_done)}"
            )
    yield "Summary", _cards(facts)
    if any(rank.bytes_needed for rank in failed.ranks):
        yield "How far each rank came", charts.progress_chart(failed.ranks)
    yield "Made by", _cards(_made_by(failed))


def _planned_sections(report: PlanReport) -> Iterator[tuple[str, str]]:
    estimated = f", estimated from {report.ranks_planned} ranks" if report.estimated else ""
    facts = {
        "mesh": " x ".join(f"{axis}={size}" for axis, size in report.mesh.items()),
        "tensors": f"{report.num_tensors:,}",
        "needed once": human_bytes(report.unique_bytes_needed),
        "to be read": f"{human_bytes(report.storage_bytes_planned)} ({report.read_amplification:.3f} x){estimated}",
        "requests": f"{report.num_requests:,}",
        "peak memory of a rank": human_bytes(report.peak_memory_bytes),
        "strategy": f"{report.strategy}: {report.strategy_reason}",
        "balance, most over mean": f"needed {report.balance.bytes_needed:.3f}, read {report.balance.bytes_read:.3f}, "
        f"files {report.balance.files:.3f}",
    }
    yield "Dry run", _cards(facts) + _warnings(report.warnings)
    yield "Topology", _topology(report.saved_as, facts["mesh"], list(report.mesh.values()))
    yield "Bytes by rank", charts.bytes_chart(report.ranks)
    yield "Bytes needed by file", charts.plan_files_chart(report.file_bytes) if report.file_bytes else ""
    if report.lower_bound_s is not None and report.predicted_s is not None:
        terms = {"storage": report.lower_bound_s}
        yield "Lower bound", charts.bound_chart(terms, report.lower_bound_s, {"predicted": report.predicted_s})
    yield "Made by", _cards(_made_by(report))


def _summary(report: StageReport) -> dict[str, str]:
    rate = report.storage_bytes_per_s
    return {
        "seconds in all": f"{report.total_s:.2f}",
        "rate of the storage": human_rate(rate) if rate else "not known",
        "needed once": human_bytes(report.unique_bytes_needed),
        "read": f"{human_bytes(report.storage_bytes_read)} ({report.read_amplification:.3f} x)",
        "requests": f"{report.num_requests:,}"
        + (f", {report.num_retries:,} tried again" if report.num_retries else ""),
        "balance, most over mean": ", ".join(
            f"{name} {max_over_mean([getattr(rank, field) for rank in report.ranks]):.3f}"
            for name, field in (("needed", "bytes_needed"), ("read", "bytes_read"))
        ),
        "strategy": f"{report.strategy}: {report.strategy_reason}",
        "nodes": str(len({rank.node for rank in report.ranks})),
        "transport": ", ".join(sorted({rank.transport for rank in report.ranks})),
    }


def _made_by(report: StageReport | FailedStage | PlanReport) -> dict[str, str]:
    found = {**report.versions, "command": report.command, "finished": report.finished}
    return {name: value for name, value in found.items() if value}


def _timeline(report: StageReport) -> str:
    """The chart, and how to look at it."""
    rows = timeline(report)
    shared = (
        "Of several ranks in a row, the one that ends last is shown. " if len(report.ranks) > charts.MAX_ROWS else ""
    )
    return f"{charts.timeline_chart(rows)}<small>{shared}A drag zooms, a double click shows all.</small>"


def _topology(saved_as: Mapping[str, int], mesh: str, sizes: Sequence[int]) -> str:
    """Boxes for how the tensors were cut, and boxes for the mesh that they are loaded on.

    Args:
        mesh, sizes: its axes in words, and their sizes.
    """
    saved = "".join(
        f"<div class=grid>{_boxes(_parts(how))}<small>{count} x {escape(how)}</small></div>"
        for how, count in list(saved_as.items())[:3]
    )
    loaded = f"<div class=grid>{_boxes([sizes[0], _product(sizes[1:])])}<small>{escape(mesh)}</small></div>"
    return f"<div class=topology><div>{saved}</div><span>→</span><div>{loaded}</div></div>" if saved else ""


def _parts(how: str) -> list[int]:
    """The first two numbers of ``dim 0 in 4, dim 1 in 2``; ones for ``whole``."""
    found = [int(part.rpartition(" ")[2]) for part in how.split(", ") if " in " in part]
    return [*found, 1, 1][:2]


def _boxes(parts: Sequence[int]) -> str:
    """A small table of boxes; dots stand for those beyond the first few."""
    rows, columns = (min(count, _MAX_BOXES) for count in parts)
    row = "<td></td>" * columns + ("<th>⋯</th>" if parts[1] > columns else "")
    more = f"<tr><th colspan={columns}>⋮</th></tr>" if parts[0] > rows else ""
    return f"<table>{f'<tr>{row}</tr>' * rows}{more}</table>"


def _product(sizes: Sequence[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def _lower_bound(report: StageReport) -> str:
    if report.lower_bound_s is None or report.ratio_to_lower_bound is None:
        return ""
    reached = {f"reached: {report.ratio_to_lower_bound:.2f} x": report.lower_bound_s * report.ratio_to_lower_bound}
    chart = charts.bound_chart(report.lower_bound_terms, report.lower_bound_s, reached)
    return f"{chart}<small>Reached are the seconds of planning and reading, without the start and the handoff.</small>"


def _keys(report: StageReport) -> str:
    overwritten = [f"group {group}: {name}: {old} → {new}" for group, name, old, new in report.overwritten]
    lists = {
        "missing": report.missing,
        "unexpected": report.unexpected,
        "missing entries": report.missing_entries,
        "unexpected entries": report.unexpected_entries,
        "hyperparameters overwritten": overwritten,
    }
    return "".join(_names(name, names) for name, names in lists.items() if names)


def _names(title: str, names: Sequence[str]) -> str:
    more = f"<li>… and {len(names) - _MAX_NAMES} more</li>" if len(names) > _MAX_NAMES else ""
    items = "".join(f"<li>{escape(name)}</li>" for name in names[:_MAX_NAMES])
    return f"<details open><summary>{len(names)} {escape(title)}</summary><ul>{items}{more}</ul></details>"


def _warnings(warnings: Sequence[str]) -> str:
    return "".join(f'<p class="warning">{escape(warning)}</p>' for warning in warnings)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table class=figures><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cards(facts: Mapping[str, str]) -> str:
    return "<dl>" + "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items()) + "</dl>"


# The browser fetches nothing, whatever plotly's script has in it for maps.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1b1f24; --soft: #5a6270; --line: #d8dce2; --card: #f5f6f8 }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171b; --text: #e8eaed; --soft: #a2a9b4; --line: #343a42; --card: #1d2126 } }
body { font: 15px/1.45 system-ui, sans-serif; background: var(--back); color: var(--text); margin: 0 auto; padding: 1.5em;
  max-width: 1150px }
h1 { font-size: 1.35em; overflow-wrap: anywhere } h2 { font-size: 1.05em; margin: 1.6em 0 .5em }
dl { display: flex; flex-wrap: wrap; gap: .6em; margin: 0 }
dl div { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .4em .8em; max-width: 100% }
dt { color: var(--soft); font-size: .85em } dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
.error, .warning { border-left: 4px solid #d1495b; background: var(--card); padding: .6em 1em; white-space: pre-wrap;
  overflow-wrap: anywhere } .warning { border-color: #d9822b }
.topology, .topology div { display: flex; align-items: center; gap: 1.2em } .topology .grid { flex-direction: column; gap: .2em }
.topology table { border-collapse: collapse } .topology td { width: 14px; height: 14px; border: 1px solid var(--soft); padding: 0 }
.topology th { color: var(--soft); font-weight: normal; line-height: 14px }
.figures { border-collapse: collapse; font-variant-numeric: tabular-nums } .figures td, .figures th { padding: .15em 1.2em;
  border-bottom: 1px solid var(--line); text-align: right } .figures td:first-child { text-align: left }
small { color: var(--soft) } ul { margin: .3em 0 }
.bartext-outside, .xtick text, .ytick text, .cbaxis text, .legendtext, .xtitle, .cbtitle text { fill: var(--text) !important }
"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{style}</style>{script}</head>
<body><h1>{title}</h1>{body}</body></html>
"""
