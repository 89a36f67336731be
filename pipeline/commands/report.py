"""``shardferry report``: show a report that a run has written, as text, page or trace, or beside that of another run."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from shardferry.errors import SpecError
from shardferry.pipeline.commands.outputs import Output, page_output, write_all
from shardferry.pipeline.display import human_bytes, print_stage, print_table
from shardferry.pipeline.exports import page_of
from shardferry.pipeline.exports.comparison import HEADER, compared
from shardferry.pipeline.exports.trace import chrome_trace
from shardferry.schemas.stage_report import FailedStage, StageReport


def show_report(file: Path, *, html: str | None, trace: str | None, compare: Path | None) -> None:
    """Print a report, or write it in other forms.

    Args:
        html, trace: where to write the page and the trace: paths or URLs.
        compare: another report, which is printed beside it, and shown beside it on the page.

    Raises:
        SpecError: a file is no report, an output can't be written, or there is no trace of a run that failed.
        StorageError: writing failed.
    """
    report, other = read_report(file), None if compare is None else read_report(compare)
    page, events = page_output(html), Output.of("--trace", trace, storage_options={})
    if events is not None:
        events.refuse_stdout()
        if isinstance(report, FailedStage):
            raise SpecError("--trace: the run failed; there is no trace of it")
    if other is None:
        print_report(report)
    elif isinstance(report, StageReport) and isinstance(other, StageReport):
        print_comparison(report, other)
    else:
        raise SpecError("--compare: one of the runs failed")
    write_all(
        [
            (page, lambda: page_of(report, other)),
            (events, lambda: chrome_trace(report) if isinstance(report, StageReport) else ""),
        ]
    )


def read_report(path: Path) -> StageReport | FailedStage:
    """Read the JSON of ``shardferry run --report``.

    Raises:
        SpecError: the file can't be read, or is something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        model = FailedStage if isinstance(values, dict) and "error" in values else StageReport
        return model.model_validate(values)
    except OSError as error:
        raise SpecError(f"{path}: can't be read: {error.strerror or error}; give what run --report wrote") from None
    except (ValueError, ValidationError) as error:
        first = " ".join(str(error).split())[:200]
        raise SpecError(f"{path}: not a report of shardferry run --report: {first}") from None


def print_report(report: StageReport | FailedStage) -> None:
    """Print the summary that the run printed, or its error."""
    if isinstance(report, StageReport):
        print_stage(report)
        return
    print(f"{report.location}: failed after {report.total_s:.2f} s")
    for rank in report.ranks:
        phase = f", last seen in the phase {rank.phase}" if rank.phase else ""
        print(f"  rank {rank.rank}: {human_bytes(rank.bytes_done)} of {human_bytes(rank.bytes_needed)}{phase}")
    print(f"{report.error_type}: {report.error}")


def print_comparison(first: StageReport, second: StageReport) -> None:
    """Print two runs side by side."""
    print_table(f"{first.location} and {second.location}", HEADER, compared(first, second))
