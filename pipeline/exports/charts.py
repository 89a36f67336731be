"""Draw a stage's ranks with plotly: their phases on an axis of time, the seconds of each phase, and bytes.

More ranks than `MAX_ROWS` share rows, so that the charts of thousands of ranks are as tall as those of 64.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from shardferry.pipeline.display import human_bytes, human_seconds
from shardferry.pipeline.exports.timeline import WHOLE_LOAD, Row
from shardferry.schemas.plan_report import RankPlan
from shardferry.schemas.stage_report import RankProgress, RankReport

MAX_ROWS = 64  # of a chart
_MAX_GROUPS = 32  # of several bars
_MAX_TEXTS = 8  # columns of a heat map that has its numbers in it

# Readable on white and on black.
_COLOURS = {
    "start": "#8a8f98",
    "join": "#a56cc1",
    "catalog": "#3aa6b9",
    "values": "#5b8def",
    "plan": "#2f6fdb",
    "allocate": "#d9822b",
    "agree": "#c2a83e",
    "read": "#2fa36b",
    "install": "#b5446e",
    "handoff": "#d1495b",
    "deliver": "#f6a6c1",
    "exchange": "#ffd166",
    "device copy": "#4cc9f0",
}
_THIN_WORK = ("deliver", "exchange", "device copy")  # kinds of work that are drawn inside the bar of the phase "read"
_OTHERS = ("#7f7f7f", "#17becf", "#bcbd22", "#e377c2", "#8c564b")
_GRID = "rgba(128,128,128,0.25)"


def script() -> str:
    """plotly's own JavaScript, for the head of a page: with it the charts need nothing from elsewhere."""
    return f"<script>{get_plotlyjs()}</script>"


def timeline_chart(rows: Sequence[Row]) -> str:
    """Bars for the phases of the driver and of each rank; of many ranks the one of each row that ends last."""
    shown: list[tuple[str, Row]] = [(row.name, row) for row in rows if row.rank is None]
    of_ranks = [row for row in rows if row.rank is not None]
    for together in bins(len(of_ranks), MAX_ROWS):
        last = max((of_ranks[index] for index in together), key=_end)
        name = last.name if len(together) == 1 else f"ranks {together[0]}–{together[-1]}: {last.rank}"
        shown.append((name, last))
    figure = go.Figure()
    known = list(_COLOURS)
    phases = dict.fromkeys(span.name for _, row in shown for span in row.spans if span.name != WHOLE_LOAD)
    for phase in sorted(phases, key=lambda name: known.index(name) if name in known else len(known)):
        bars = [(name, row, span) for name, row in shown for span in row.spans if span.name == phase]
        figure.add_bar(
            name=phase,
            orientation="h",
            y=[name for name, _, _ in bars],
            base=[span.start for _, _, span in bars],
            x=[span.end - span.start for _, _, span in bars],
            marker_color=colour(phase),
            customdata=[[row.process, span.start, span.end, span.end - span.start] for _, row, span in bars],
            hovertemplate=f"%{{y}}, {phase}: %{{customdata[3]:.3f}} s<br>%{{customdata[1]:.3f}} to %{{customdata[2]:.3f}} s"
            "<br>%{customdata[0]}<extra></extra>",
        )
    for kind in _THIN_WORK:
        spans = [(name, span, row.busy.get(kind, 0.0)) for name, row in shown for span in row.work if span.name == kind]
        if spans:
            figure.add_bar(
                name=f"in it: {kind}",
                orientation="h",
                y=[name for name, _, _ in spans],
                base=[span.start for _, span, _ in spans],
                x=[span.end - span.start for _, span, _ in spans],
                width=0.22,
                offset=0.36 - 0.24 * (1 + _THIN_WORK.index(kind)),
                marker_color=colour(kind),
                customdata=[[busy, span.start, span.end] for _, span, busy in spans],
                hovertemplate=f"%{{y}}, {kind}: busy for %{{customdata[0]:.3f}} s"
                "<br>%{customdata[1]:.3f} to %{customdata[2]:.3f} s<extra></extra>",
            )
    shown_from, shown_to = _shown_range(rows)
    hidden = f"; {shown_from:.1f} s of the start are to the left, a double click shows them" if shown_from else ""
    figure.update_xaxes(title=f"seconds{hidden}", range=[shown_from, shown_to])
    return _html(figure, [name for name, _ in shown], row_px=26)


def _shown_range(rows: Sequence[Row]) -> list[float]:
    """The seconds that are seen at first: without most of a start that takes longer than all else."""
    end = max((_end(row) for row in rows), default=0.0)
    loads = [span.start for row in rows for span in row.spans if span.name == WHOLE_LOAD]
    begun = min(loads, default=0.0)
    return [max(0.0, begun - 0.2 * (end - begun)) if begun > 2 * (end - begun) else 0.0, end + 0.02 * (end - begun)]


def seconds_chart(ranks: Sequence[RankReport]) -> str:
    """A heat map of seconds, a column for each phase; of many ranks the most of each row."""
    phases = list(dict.fromkeys(name for rank in ranks for name in rank.phases))
    rows = list(_rows([rank.rank for rank in ranks], MAX_ROWS))
    seconds = [[max(ranks[i].phases.get(phase, 0.0) for i in together) for phase in phases] for _, together in rows]
    figure = go.Figure(
        go.Heatmap(
            z=seconds,
            x=phases,
            y=[name for name, _ in rows],
            colorscale="Viridis",
            showscale=False,  # the numbers are there
            texttemplate="%{z:.3f}",
            hovertemplate="%{y}, %{x}: %{z:.4f} s<extra></extra>",
        )
    )
    figure.update_xaxes(side="top")
    return _html(figure, [name for name, _ in rows], row_px=20)


def bytes_chart(ranks: Sequence[RankReport] | Sequence[RankPlan]) -> str:
    """Bars of the bytes that each rank needs, reads, sends and receives; of many ranks the most of each row."""
    columns = {
        "needed": [rank.bytes_needed for rank in ranks],
        "read": [rank.bytes_read for rank in ranks],
        "sent": [rank.bytes_sent for rank in ranks],
        "received": [rank.bytes_received for rank in ranks],
    }
    colours = {"needed": "#8a8f98", "read": "#2fa36b", "sent": "#d9822b", "received": "#2f6fdb"}
    shown = {name: counts for name, counts in columns.items() if any(counts)}
    return _byte_bars([rank.rank for rank in ranks], shown, colours)


def files_chart(ranks: Sequence[RankReport]) -> str:
    """A heat map of the bytes that each rank asked of each file; many ranks, and many files, share rows and columns."""
    paths = sorted({path for rank in ranks for path in rank.file_bytes}, key=_with_numbers)
    if not paths:
        return ""
    rows, columns = list(_rows([rank.rank for rank in ranks], MAX_ROWS)), bins(len(paths), MAX_ROWS)
    column_of = {paths[i]: place for place, together in enumerate(columns) for i in together}
    counts = [[0] * len(columns) for _ in rows]
    for row, (_, together) in enumerate(rows):
        for index in together:
            for path, nbytes in ranks[index].file_bytes.items():
                counts[row][column_of[path]] += nbytes
    names = [paths[c[0]] if len(c) == 1 else f"{paths[c[0]]} to {paths[c[-1]]}" for c in columns]
    figure = go.Figure(
        go.Heatmap(
            z=counts,
            x=names,
            y=[name for name, _ in rows],
            text=[[human_bytes(nbytes) for nbytes in row] for row in counts],
            colorscale="Viridis",
            texttemplate="%{text}" if len(names) <= _MAX_TEXTS else None,
            showscale=len(names) > _MAX_TEXTS,
            colorbar=_byte_ticks(max(map(max, counts))),
            hovertemplate="%{y}<br>%{x}<br>%{text}<extra></extra>",
        )
    )
    figure.update_xaxes(showticklabels=len(names) <= 16)
    return _html(figure, [name for name, _ in rows], row_px=20)


def progress_chart(ranks: Sequence[RankProgress]) -> str:
    """Bars of the bytes that each rank had, of those that it needed, when the stage failed."""
    columns = {
        "needed": [rank.bytes_needed for rank in ranks],
        "done": [rank.bytes_done for rank in ranks],
    }
    return _byte_bars([rank.rank for rank in ranks], columns, {"needed": "#8a8f98", "done": "#2fa36b"})


def plan_files_chart(file_bytes: Mapping[str, int]) -> str:
    """Bars of the bytes that the ranks need of each file; of many files the sum of each row."""
    paths = sorted(file_bytes, key=_with_numbers)
    together = bins(len(paths), _MAX_GROUPS)
    names = [paths[c[0]] if len(c) == 1 else f"{paths[c[0]]} to {paths[c[-1]]}" for c in together]
    counts = [sum(file_bytes[paths[i]] for i in c) for c in together]
    figure = go.Figure()
    figure.add_bar(
        orientation="h",
        y=names,
        x=counts,
        marker_color="#8a8f98",
        customdata=[human_bytes(count) for count in counts],
        hovertemplate="%{y}: %{customdata}<extra></extra>",
    )
    figure.update_xaxes(rangemode="tozero", **_byte_ticks(max(counts, default=0)))
    return _html(figure, names, row_px=22)


def bound_chart(terms: Mapping[str, float], bound_s: float, reached: Mapping[str, float]) -> str:
    """Bars of seconds: each limit alone, the lower bound, and what was reached."""
    rows = {**{f"limit: {name}": s for name, s in terms.items()}, "lower bound": bound_s, **reached}
    colours = ["#8a8f98"] * len(terms) + ["#2f6fdb"] + ["#2fa36b"] * len(reached)
    figure = go.Figure()
    figure.add_bar(
        orientation="h",
        y=list(rows),
        x=list(rows.values()),
        marker_color=colours,
        text=[human_seconds(seconds) for seconds in rows.values()],
        textposition="outside",
        cliponaxis=False,
        hovertemplate="%{y}: %{text}<extra></extra>",
    )
    figure.update_xaxes(title="seconds", rangemode="tozero", range=[0, 1.12 * max(rows.values())])
    return _html(figure, list(rows), row_px=26)


def bins(count: int, most: int) -> list[range]:
    """Consecutive numbers below ``count`` in at most ``most`` ranges of one length, the last one perhaps shorter."""
    size = max(1, -(-count // most))
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def colour(phase: str) -> str:
    """The colour of a phase, in all charts."""
    return _COLOURS.get(phase, _OTHERS[sum(phase.encode()) % len(_OTHERS)])


def _byte_bars(numbers: Sequence[int], columns: Mapping[str, Sequence[int]], colours: Mapping[str, str]) -> str:
    rows = list(_rows(numbers, _MAX_GROUPS))
    figure = go.Figure()
    for name, counts in columns.items():
        most = [max(counts[i] for i in together) for _, together in rows]
        figure.add_bar(
            name=name,
            orientation="h",
            y=[label for label, _ in rows],
            x=most,
            marker_color=colours[name],
            customdata=[human_bytes(count) for count in most],
            hovertemplate=f"%{{y}}, {name}: %{{customdata}}<extra></extra>",
        )
    figure.update_xaxes(rangemode="tozero", **_byte_ticks(max((max(counts) for counts in columns.values()), default=0)))
    figure.update_layout(barmode="group")
    return _html(figure, [label for label, _ in rows], row_px=10 + 7 * len(columns))


def _byte_ticks(most: int) -> dict[str, Any]:
    """Ticks of an axis of bytes: at most nine, at a power of two."""
    step = 1 << max(0, (most // 8).bit_length())
    values = list(range(0, most + step, step))
    return {"tickvals": values, "ticktext": [human_bytes(value) for value in values]}


def _rows(numbers: Sequence[int], most: int) -> Iterator[tuple[str, range]]:
    """Labels, and the places in ``numbers`` that share the row."""
    for together in bins(len(numbers), most):
        first, last = numbers[together[0]], numbers[together[-1]]
        yield f"rank {first}" if len(together) == 1 else f"ranks {first}–{last}", together


def _with_numbers(path: str) -> list[tuple[int, str]]:
    """For sorting: ``__2_0.distcp`` comes before ``__10_0.distcp``."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", path)]


def _end(row: Row) -> float:
    return max((span.end for span in row.spans), default=0.0)


def _html(figure: go.Figure, labels: Sequence[str], *, row_px: int) -> str:
    """The chart without plotly's script; the page's style sets the colour of its text."""
    figure.update_yaxes(categoryorder="array", categoryarray=list(labels), autorange="reversed", automargin=True)
    figure.update_xaxes(gridcolor=_GRID, zerolinecolor=_GRID)
    if figure.layout.barmode is None:
        figure.update_layout(barmode="overlay")
    is_map = any(trace.type == "heatmap" for trace in figure.data)
    has_legend = sum(trace.type == "bar" for trace in figure.data) > 1
    margin = {"t": 40 if is_map or has_legend else 10, "b": 25 if is_map else 50}
    figure.update_layout(
        height=sum(margin.values()) + max(40, row_px * len(labels)),
        margin={"l": 10, "r": 10, **margin},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        bargap=0.25,
        showlegend=has_legend,
        legend={"orientation": "h", "y": 1, "yanchor": "bottom"},
    )
    config = {"displayModeBar": False, "responsive": True}  # a drag zooms, a double click shows all again
    return str(figure.to_html(full_html=False, include_plotlyjs=False, config=config))
