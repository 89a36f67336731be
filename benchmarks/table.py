"""Show figures as tables: drawn on a terminal, plain columns in a file, Markdown to paste."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.contenders import CONTENDERS
from benchmarks.floor import Floor
from benchmarks.limits import verdicts
from benchmarks.ours import Cooperative, Shardferry
from benchmarks.run import Figures
from benchmarks.stock import StockLoad
from benchmarks.stores import StoreKind

CaseResults = Mapping[Case, Mapping[str, Figures]]  # figures of each contender, by case
Results = Mapping[StoreKind, CaseResults]


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""  # below it


def tables(results: Results) -> list[Table]:
    """All tables of a run."""
    return [table for kind, cases in results.items() for table in tables_of_store(kind, cases)]


def tables_of_store(kind: StoreKind, cases: CaseResults) -> list[Table]:
    """All tables of one store."""
    found = [limits_table(kind, cases), time_table(kind, cases)]
    if kind is StoreKind.WARM:
        found.append(fresh_table(kind, cases))
    return [*found, reading_table(kind, cases), costs_table(kind, cases), phases_table(kind, cases)]


def summary_table(results: Results) -> Table:
    """One row per case: for each store, Shardferry's time over the floor, stock's time over Shardferry's, and bytes read."""
    header = ["case"]
    for kind in results:
        header += [f"{kind.value}: x floor", f"{kind.value}: stock/ours", f"{kind.value}: bytes"]
    titles = dict.fromkeys(case for cases in results.values() for case in cases)
    rows = []
    for case in titles:
        row = [case.title]
        for cases in results.values():
            row += _summary_cells(cases[case]) if case in cases else ["-"] * 3
        rows.append(row)
    return Table("Times, and bytes of cooperative reads over the unique needed ones", header, rows)


def _summary_cells(figures: Mapping[str, Figures]) -> list[str]:
    ours, stock = figures[Shardferry.name], figures.get(StockLoad.name)
    return [
        f"{ours.wall_s / figures[Floor.name].wall_s:.2f}",
        "-" if stock is None else f"{stock.wall_s / ours.wall_s:.2f}",
        f"{figures[Cooperative.name].bytes_ratio:.3f}",
    ]


def limits_table(kind: StoreKind, cases: CaseResults) -> Table:
    """Shardferry against the project's limits."""
    judged = {case: verdicts(kind, figures) for case, figures in cases.items()}
    first = next(iter(judged.values()))
    header = ["case", *(f"{verdict.what} ({verdict.wanted})" for verdict in first)]
    rows = [[case.title, *map(str, found)] for case, found in judged.items()]
    return Table(f"Shardferry against its limits: {kind.title}", header, rows)


def time_table(kind: StoreKind, cases: CaseResults) -> Table:
    """Seconds of wall time of each contender, and their ratios to the floor."""
    title = f"{_TIMES}: {kind.title}{_disk_rate(kind, cases)}, destinations touched"
    table = _by_contender(title, cases, lambda found, floor: _over(found.wall_s, floor.wall_s))
    return _with_fresh_marked(table)


def fresh_table(kind: StoreKind, cases: CaseResults) -> Table:
    """The same where the load allocates its destinations."""
    measured = {case: figures for case, figures in cases.items() if figures[Floor.name].fresh_wall_s}
    title = f"{_TIMES}: {kind.title}, destinations fresh"
    return _by_contender(title, measured, lambda found, floor: _over(found.fresh_wall_s or 0, floor.fresh_wall_s or 1))


def reading_table(kind: StoreKind, cases: CaseResults) -> Table:
    """What each contender asks of storage."""
    title = f"Bytes asked of storage by all ranks over the unique needed ones, and requests: {kind.title}"
    return _by_contender(title, cases, lambda found, _: f"{found.bytes_ratio:.3f} / {found.requests}")


def costs_table(kind: StoreKind, cases: CaseResults) -> Table:
    """Processor time and memory."""
    title = f"CPU s of all ranks (x floor), peak MiB over the shard of the rank where it is highest: {kind.title}"
    return _by_contender(
        title,
        cases,
        lambda found, floor: f"{_over(found.cpu_s, floor.cpu_s)}, {found.peak_over_shard / 2**20:.0f}",
    )


def phases_table(kind: StoreKind, cases: CaseResults) -> Table:
    """Where Shardferry's time goes, and stock's over it."""
    parts = {case: figures[Shardferry.name].phases for case, figures in cases.items()}
    names = list(next(iter(parts.values())))
    rows = []
    for case, figures in cases.items():
        ours, stock = figures[Shardferry.name], figures.get(StockLoad.name)
        milliseconds = [f"{1000 * ours.phases.get(name, 0):.0f}" for name in names]
        rows.append([case.title, *milliseconds, "-" if stock is None else f"{stock.cpu_s / ours.cpu_s:.2f}"])
    title = f"Shardferry by phase, ms, slowest rank; stock's CPU time over its: {kind.title}"
    return Table(title, ["case", *names, "stock CPU/ours"], rows)


_TIMES = "Seconds (x floor)"
_FRESH = "†"  # at figures whose destinations are fresh in a table of touched ones


def _with_fresh_marked(table: Table) -> Table:
    """The figures of those who allocate their destinations in every load, marked, and what the mark means."""
    names = [kind.name for kind in CONTENDERS if kind.allocates and kind.name in table.header]
    if not names:
        return table
    columns = [table.header.index(name) for name in names]
    rows = [
        [f"{cell} {_FRESH}" if place in columns and cell != "-" else cell for place, cell in enumerate(row)]
        for row in table.rows
    ]
    note = f"{_FRESH} {', '.join(names)}: allocates its destinations in every load, so that they are fresh here too"
    return replace(table, rows=rows, note=note)


def _by_contender(title: str, cases: CaseResults, cell: Callable[[Figures, Figures], str]) -> Table:
    """A column for each contender that was measured; of the others the reason."""
    shown = [kind for kind in CONTENDERS if any(kind.name in figures for figures in cases.values())]
    rows = [
        [
            case.title,
            *(cell(figures[kind.name], figures[Floor.name]) if kind.name in figures else "-" for kind in shown),
        ]
        for case, figures in cases.items()
    ]
    return Table(title, ["case", *(kind.name for kind in shown)], rows)


def _over(seconds: float, floor_s: float) -> str:
    return f"{seconds:.3f} ({seconds / floor_s:.2f})"


def _disk_rate(kind: StoreKind, cases: CaseResults) -> str:
    """What the disk gives the floor, and whether it was the disk that gave it."""
    if kind is not StoreKind.COLD:
        return ""
    rates = [figures[Floor.name].unique_bytes / figures[Floor.name].wall_s for figures in cases.values()]
    warm = max(found.warm_share for figures in cases.values() for found in figures.values())
    warning = f"; up to {100 * warm:.0f} % of the files could NOT be dropped from the page cache" if warm > 0.01 else ""
    return f" (the disk gives the floor {min(rates) / 1e9:.1f} to {max(rates) / 1e9:.1f} GB/s{warning})"


def markdown(table: Table) -> str:
    """A table as GitHub shows it."""
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    note = f"\n{table.note}\n" if table.note else ""
    return f"**{table.title}**\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n" + note


def plain(table: Table) -> str:
    """A table in columns of spaces."""
    widths = [max(len(row[column]) for row in [table.header, *table.rows]) for column in range(len(table.header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in [table.header, *table.rows]
    ]
    note = [table.note] if table.note else []
    return "\n".join([table.title, *(line.rstrip() for line in lines), *note, ""])


def show(table: Table) -> None:
    """Print a table: drawn where a person looks and rich is installed, else in plain columns."""
    if sys.stdout.isatty():
        try:
            _draw(table)
        except ImportError:
            pass
        else:
            return
    print(plain(table))


def _draw(table: Table) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable

    drawn = RichTable(title=table.title, caption=table.note or None)
    for place, column in enumerate(table.header):
        drawn.add_column(column, justify="left" if place == 0 or column == "who" else "right")
    for row in table.rows:
        style = "red" if any(cell.endswith(" missed") for cell in row) else None
        drawn.add_row(*row, style=style)
    Console().print(drawn)


def tell(
    results: dict[str, Any],
    limits: Iterable[tuple[str, str, str, bool]],
    tables: Callable[[dict[str, Any]], Iterable[Table]],
    file: Path | None,
) -> None:
    """Add the limits to the figures, print the machine and the tables, and write all as JSON.

    Args:
        limits: what is limited, the limit, the figure, and whether it is met.
    """
    results["limits"] = [
        {"what": what, "wanted": wanted, "found": found, "met": met} for what, wanted, found, met in limits
    ]
    print(", ".join(f"{what} {value}" for what, value in results["machine"].items()))
    for table in tables(results):
        print(plain(table))
    if file is not None:
        file.write_text(json.dumps(results, indent=1))
