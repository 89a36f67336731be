"""Turn a stage's report into rows of spans on one axis of time: the driver's, and each rank's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from shardferry.schemas.stage_report import Span, StageReport

WHOLE_LOAD = "load"  # the span around a rank's phases
_BEFORE_THE_RANKS = ("catalog", "start")  # phases of the driver; the last one ends when all ranks have joined


@dataclass(frozen=True, slots=True)
class Row:
    """The spans of one process. Times are in seconds since the row's stage began."""

    process: str  # its node; the driver is a process of its own
    rank: int | None  # None: the driver
    spans: tuple[Span, ...]
    work: tuple[
        Span, ...
    ] = ()  # inside the phase "read": exchange, device copy, ...; each from its first start to its last end
    busy: Mapping[str, float] = field(default_factory=dict)  # seconds of each kind of work, without the pauses

    @property
    def name(self) -> str:
        """For people."""
        return "driver" if self.rank is None else f"rank {self.rank}"


def timeline(report: StageReport) -> list[Row]:
    """The driver's row, if it has phases, and a row for each rank."""
    driver, origin = _driver_spans(report), first_start(report)

    def shifted(spans: list[Span]) -> tuple[Span, ...]:
        return tuple(Span(name=s.name, start=s.start - origin, end=s.end - origin) for s in spans)

    rows = [Row("driver", None, shifted(driver))] if driver else []
    for rank in report.ranks:
        work = [Span(name=w.kind, start=w.start, end=w.end) for w in rank.work]
        rows.append(Row(rank.node, rank.rank, shifted(rank.spans), shifted(work), rank.busy))
    return rows


def first_start(report: StageReport) -> float:
    """When the stage began: seconds since the epoch."""
    spans = [*_driver_spans(report), *(span for rank in report.ranks for span in rank.spans)]
    return min((span.start for span in spans), default=0.0)


def total_s(report: StageReport) -> float:
    """Seconds from the begin of the first span to the end of the last one."""
    return max((span.end for row in timeline(report) for span in row.spans), default=0.0)


def _driver_spans(report: StageReport) -> list[Span]:
    """The driver's phases. The report has their seconds; where they are follows from the ranks' spans."""
    of_ranks = {name for rank in report.ranks for name in rank.phases}
    phases = {name: seconds for name, seconds in report.phases.items() if name not in of_ranks}
    spans = [span for rank in report.ranks for span in rank.spans]
    joined = max((span.end for span in spans if span.name == "join"), default=0.0)
    loads = [span for span in spans if span.name == WHOLE_LOAD]
    begun = joined or min((span.start for span in loads), default=0.0)
    done = max((span.end for span in loads), default=begun)
    begun -= sum(phases.get(name, 0.0) for name in _BEFORE_THE_RANKS)
    found = []
    for name, seconds in phases.items():
        if name in _BEFORE_THE_RANKS:
            found.append(Span(name=name, start=begun, end=begun + seconds))
            begun += seconds
        else:
            found.append(Span(name=name, start=done, end=done + seconds))
            done += seconds
    return found
