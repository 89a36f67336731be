"""Terminal output: progress as a bar, or as plain lines outside of a terminal, and tables.

rich is imported when something is drawn: a command that prints JSON doesn't need it.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from shardferry.actors.progress import Progress
from shardferry.schemas.plan_report import PlanReport
from shardferry.schemas.stage_report import StageReport, what_is_loaded

_LINE_EVERY_S = 5.0
_MAX_RANKS_SHOWN = 32  # a longer table is replaced by least, median and most


class ByteProgress(Protocol):
    """Shows how many bytes of how many are done."""

    def show(self, done: int, total: int, note: str = "") -> None:
        """Show that ``done`` of ``total`` bytes are done; a ``total`` of 0 is not known yet.

        Args:
            note: more, for a line of a log.
        """
        ...


class Meter:
    """Says how far a load is. Its rate counts from the first bytes: the actors' start doesn't count."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None  # when the first bytes were seen, and how many they were

    def words(self, done: int, total: int, note: str = "") -> str:
        """Part, bytes, rate and time left, as far as they are known.

        Args:
            done, total, note: as for `ByteProgress.show`.
        """
        now = time.monotonic()
        if done and self._first is None:
            self._first = now, done
        if not total:
            return "waiting for the ranks to start"
        words = f"{done / total:4.0%} {human_bytes(done)} of {human_bytes(total)}"
        if rate := self._rate(now, done):
            words += f", {human_rate(rate)}" + (f", {(total - done) / rate:.0f} s left" if done < total else "")
        return words + (f"; {note}" if note and done < total else "")

    def _rate(self, now: float, done: int) -> float | None:
        """Bytes per second since the first bytes were seen. None before there is one."""
        if self._first is None or now <= self._first[0]:
            return None
        return (done - self._first[1]) / (now - self._first[0])


class _Lines:
    """Prints a line every few seconds, and one at the end; for logs."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._meter = Meter()
        self._last = time.monotonic()
        self._finished = False

    def show(self, done: int, total: int, note: str = "") -> None:
        now, words = time.monotonic(), self._meter.words(done, total, note)
        finished = bool(total) and done >= total
        if self._finished or not (finished or now - self._last >= _LINE_EVERY_S):
            return
        self._last, self._finished = now, finished
        print(f"{self._title}: {words}", file=sys.stderr)


@contextmanager
def byte_progress(title: str) -> Iterator[ByteProgress]:
    """A bar with bytes, rate and time left on a terminal and in a notebook; plain lines on stderr elsewhere."""
    if "ipykernel" in sys.modules:
        from shardferry.pipeline.notebook_bar import NotebookBar

        yield NotebookBar(title)
    elif sys.stderr.isatty():
        from shardferry.pipeline.progress_bar import byte_bar

        with byte_bar(title) as bar:
            yield bar
    else:
        yield _Lines(title)


def show_ranks(bar: ByteProgress, ranks: Sequence[Progress]) -> None:
    """Show the sum of the ranks' progress."""
    known = all(rank.bytes_total for rank in ranks)
    bar.show(sum(r.bytes_done for r in ranks), sum(r.bytes_total for r in ranks) if known else 0, _slowest(ranks))


def _slowest(ranks: Sequence[Progress]) -> str:
    """The rank that has the least part of its bytes, in words; nothing for one rank."""
    if len(ranks) < 2 or not all(rank.bytes_total for rank in ranks):
        return ""
    parts = [rank.bytes_done / rank.bytes_total for rank in ranks]
    return f"slowest is rank {parts.index(min(parts))} at {min(parts):.0%}"


@contextmanager
def progress(title: str = "loading") -> Iterator[Callable[[Sequence[Progress]], None]]:
    """Show the progress of a load: ``with progress() as shown: stage.run(trainers, on_progress=shown)``.

    A bar on a terminal and in a notebook; elsewhere a line every 5 s on stderr, with bytes, rate and the slowest rank.
    """
    with byte_progress(title) as bar:
        yield lambda ranks: show_ranks(bar, ranks)


def human_bytes(count: float) -> str:
    """A number of bytes with a unit: 1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def human_rate(bytes_per_s: float) -> str:
    """Bytes per second with a decimal unit, as disks and networks are sold: 1.2e8 -> '120 MB/s'."""
    for unit in ("B", "kB", "MB"):
        if bytes_per_s < 1000:
            return f"{bytes_per_s:.3g} {unit}/s"
        bytes_per_s /= 1000
    return f"{bytes_per_s:.3g} GB/s" if bytes_per_s < 1000 else f"{bytes_per_s:.0f} GB/s"


def human_seconds(seconds: float) -> str:
    """Seconds with three digits and a unit: 0.0123 -> '12.3 ms'."""
    if seconds >= 100:
        return f"{seconds:.0f} s"
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table on stdout; the first column is text, the others are numbers."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(str, row))
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(table)


def print_plan(report: PlanReport) -> None:
    """Print a dry run: rank by rank, or least, median and most of each column where there are many ranks."""
    header = ("rank", "needed", "read", "sent", "received", "requests", "arena")
    columns = [
        [getattr(rank, name) for rank in report.ranks]
        for name in ("bytes_needed", "bytes_read", "bytes_sent", "bytes_received", "num_requests", "arena_bytes")
    ]
    rows: list[tuple[object, list[int]]] = [(r.rank, [c[r.rank] for c in columns]) for r in report.ranks]
    if len(report.ranks) > _MAX_RANKS_SHOWN:
        header = (f"{len(report.ranks)} ranks", *header[1:])
        rows = [
            (name, [of(column) for column in columns])
            for name, of in (("least", min), ("median", statistics.median_low), ("most", max))
        ]
    mesh = " x ".join(f"{axis}={size}" for axis, size in report.mesh.items())
    print_table(
        f"{report.location}: {report.num_tensors} tensors of {what_is_loaded(report.optimizer_key)} on {mesh}",
        header,
        [(name, *_counts(counts)) for name, counts in rows],
    )
    print(_plan_summary(report))


def _counts(counts: list[int]) -> list[object]:
    """Texts of one row: bytes, except for the second last column, the number of requests."""
    return [str(count) if place == len(counts) - 2 else human_bytes(count) for place, count in enumerate(counts)]


def _plan_summary(report: PlanReport) -> str:
    summary = (
        f"needed once {human_bytes(report.unique_bytes_needed)}, read {human_bytes(report.storage_bytes_planned)} "
        f"({report.read_amplification:.3f} x) in {report.num_requests} requests; "
        f"peak memory per rank {human_bytes(report.peak_memory_bytes)}\n"
        f"most over mean: needed {report.balance.bytes_needed:.3f}, read {report.balance.bytes_read:.3f}, "
        f"files {report.balance.files:.3f}\n"
    )
    if report.estimated:
        summary += f"reads are estimated from the plans of {report.ranks_planned} ranks; what ranks need is exact\n"
    if report.lower_bound_s is None:
        return (
            summary
            + "seconds: not predicted; give the storage's bandwidth, read.storage_bandwidth or --storage-bandwidth"
        )
    return (
        summary
        + f"lower bound {report.lower_bound_s:.3f} s, predicted {report.predicted_s:.3f} s at the bandwidth given"
    )


def print_stage(report: StageReport) -> None:
    """Print the report of a finished stage."""
    header = ("rank", "device", "needed", "read", "requests", "arena", "read s", "transport")
    rows = [
        (
            r.rank,
            r.device,
            human_bytes(r.bytes_needed),
            human_bytes(r.bytes_read),
            r.num_requests,
            human_bytes(r.arena_bytes),
            f"{r.phases.get('read', 0.0):.3f}",
            r.transport,
        )
        for r in report.ranks
    ]
    title = f"{report.location}: {what_is_loaded(report.optimizer_key)} loaded on {report.world_size} ranks"
    print_table(title, header, rows)
    print("".join(f"warning: {warning}\n" for warning in report.warnings), end="")
    print("  ".join(f"{name} {seconds:.3f} s" for name, seconds in report.phases.items()))
    if report.busy:
        print("busy reading: " + "  ".join(f"{name} {seconds:.3f} s" for name, seconds in report.busy.items()))
    rate = f" at {human_rate(report.storage_bytes_per_s)}" if report.storage_bytes_per_s else ""
    print(
        f"needed once {human_bytes(report.unique_bytes_needed)}, read {human_bytes(report.storage_bytes_read)} "
        f"({report.read_amplification:.3f} x){rate}; {report.total_s:.2f} s in all"
    )
    if report.lower_bound_s is not None and report.ratio_to_lower_bound is not None:
        reached = report.lower_bound_s * report.ratio_to_lower_bound
        print(
            f"planning and reading took {reached:.3f} s, {report.ratio_to_lower_bound:.2f} x the lower bound of "
            f"{report.lower_bound_s:.3f} s"
        )
