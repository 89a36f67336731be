"""The report of one rank, from what its load has counted."""

from __future__ import annotations

from shardferry.actors.rank_report import rank_report
from shardferry.load import LoadFigures
from shardferry.schemas.stage_report import Span

NUMBERS = (
    "bytes_needed",
    "bytes_read",
    "bytes_sent",
    "bytes_received",
    "bytes_forwarded",
    "num_requests",
    "num_retries",
    "arena_bytes",
)


def test_a_span_is_around_the_phases_of_the_load() -> None:
    """The timeline is cut where it begins."""
    figures = LoadFigures(
        **dict.fromkeys(NUMBERS, 0),
        device="cpu",
        strategy="direct",
        strategy_reason="",
        busy={},
        work=(),
        seconds={"plan": 1.0, "read": 2.0},
        file_bytes={},
        requests=(),
        missing=(),
        unexpected=(),
    )
    measures = {"node": "node", "gpu_ids": [], "peak_rss_bytes": 1, "host_copy_bandwidth": 1.0}
    join = Span(name="join", start=5.0, end=9.0)
    report = rank_report(figures, measures, rank=0, transport="shared_memory", before=[join], load_start=10.0)
    assert [(span.name, span.start, span.end) for span in report.spans] == [
        ("join", 5.0, 9.0),
        ("plan", 10.0, 11.0),
        ("read", 11.0, 13.0),
        ("load", 10.0, 13.0),
    ]
    assert report.phases == {"join": 4.0, "plan": 1.0, "read": 2.0}
