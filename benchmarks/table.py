"""Show figures as tables: drawn on a terminal, plain columns in a file, Markdown to paste."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.cases import Case
from benchmarks.contenders import Floor, StockLoad, StockShardedLoad
from benchmarks.limits import verdicts
from benchmarks.run import Figures

Results = Mapping[Case, Mapping[str, Figures]]  # figures of each contender, by case


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(results: Results) -> list[Table]:
    """All tables of a run."""
    return [limits_table(results), time_table(results), reading_table(results), phases_table(results)]


def limits_table(results: Results) -> Table:
    """Shardferry against the project's limits."""
    judged = {case: verdicts(figures) for case, figures in results.items()}
    first = next(iter(judged.values()))
    header = ["case", *(f"{verdict.what} ({verdict.wanted})" for verdict in first)]
    rows = [[case.title, *map(str, found)] for case, found in judged.items()]
    return Table("Shardferry against its limits (page cache warm, destinations touched)", header, rows)


def time_table(results: Results) -> Table:
    """Seconds of wall and CPU of each contender, and their ratios to the floor and to stock."""
    header = [
        "case",
        "who",
        "wall s",
        "x floor",
        "stock/this",
        "CPU s",
        "x floor",
        "fresh wall s",
        "x floor",
        "fresh CPU s",
    ]
    rows: list[Sequence[str]] = []
    for case, figures in results.items():
        floor, stock = figures[Floor.name], figures[StockLoad.name]
        for name, found in figures.items():
            rows.append(
                [
                    case.title,
                    name,
                    f"{found.wall_s:.3f}",
                    f"{found.wall_s / floor.wall_s:.2f}",
                    f"{stock.wall_s / found.wall_s:.2f}",
                    f"{found.cpu_s:.2f}",
                    f"{found.cpu_s / floor.cpu_s:.2f}",
                    f"{found.fresh_wall_s:.3f}",
                    f"{found.fresh_wall_s / floor.fresh_wall_s:.2f}",
                    f"{found.fresh_cpu_s:.2f}",
                ]
            )
        if StockShardedLoad.name not in figures:
            rows.append([case.title, StockShardedLoad.name, "can't cut columns", *[""] * (len(header) - 3)])
    return Table("Time: medians; destinations touched before the clock, and fresh ones", header, rows)


def reading_table(results: Results) -> Table:
    """What each contender asks of storage, and how much memory it takes."""
    header = ["case", "who", "bytes/unique", "worst rank/needed", "requests", "peak over shard MiB"]
    rows = [
        [
            case.title,
            name,
            f"{found.bytes_asked / found.unique_bytes:.3f}",
            f"{found.worst_rank_ratio:.3f}",
            f"{found.requests}",
            f"{max(found.peak_over_shard, 0) / 2**20:.0f}",
        ]
        for case, figures in results.items()
        for name, found in figures.items()
    ]
    return Table(
        "Bytes asked of storage, all ranks over the unique needed ones; peak with fresh destinations", header, rows
    )


def phases_table(results: Results) -> Table:
    """Where Shardferry's time goes."""
    parts = {
        case: next(found.phases for found in figures.values() if found.phases) for case, figures in results.items()
    }
    names = list(next(iter(parts.values())))
    rows = [[case.title, *(f"{1000 * phases[name]:.0f}" for name in names)] for case, phases in parts.items()]
    return Table("Shardferry by phase, ms, slowest rank", ["case", *names], rows)


def markdown(table: Table) -> str:
    """A table as GitHub shows it."""
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    return f"**{table.title}**\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def plain(table: Table) -> str:
    """A table in columns of spaces."""
    widths = [max(len(row[column]) for row in [table.header, *table.rows]) for column in range(len(table.header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in [table.header, *table.rows]
    ]
    return "\n".join([table.title, *(line.rstrip() for line in lines), ""])


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

    drawn = RichTable(title=table.title)
    for place, column in enumerate(table.header):
        drawn.add_column(column, justify="left" if place == 0 or column == "who" else "right")
    for row in table.rows:
        style = "red" if any(cell.endswith(" missed") for cell in row) else None
        drawn.add_row(*row, style=style)
    Console().print(drawn)
