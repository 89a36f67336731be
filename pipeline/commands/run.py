"""``shardferry run``: the stage on a cluster or an embedded Ray, and its reports, also where it fails."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardferry.actors.progress import Progress
from shardferry.errors import LayoutError, RankError, ShardferryError, SpecError
from shardferry.layout.spec import SpecLayout
from shardferry.pipeline.cluster import ray_for, reads_on_other_nodes
from shardferry.pipeline.commands.interrupts import Interrupts
from shardferry.pipeline.commands.outputs import Output, options_beside, page_output, write_all
from shardferry.pipeline.display import byte_progress, print_stage, show_ranks
from shardferry.pipeline.exports import page_of
from shardferry.pipeline.exports.trace import chrome_trace
from shardferry.pipeline.preflight import check_checkpoint, check_topology, open_checkpoint_of, target_layout
from shardferry.pipeline.stage import OptimizerLoadStage
from shardferry.pipeline.versions import made_by
from shardferry.schemas.stage_config import StageConfig
from shardferry.schemas.stage_report import FailedStage, RankProgress, StageReport


@dataclass(frozen=True, slots=True)
class ReportOutputs:
    """Where the reports of a run go; None: not asked for."""

    report: Output | None
    trace: Output | None
    html: Output | None

    @classmethod
    def of(cls, places: Mapping[str, str | None], config: StageConfig, location: str | None) -> ReportOutputs:
        """Check where the reports shall go.

        Args:
            places: a path, a URL or ``-``, by the name of the option.
            location: of the checkpoint; an output in the same kind of storage is opened with the checkpoint's options.

        Raises:
            SpecError: an output can't be written, or plotly is not installed.
        """
        given = config.checkpoint.storage_options
        options = {name: options_beside(location, given, where) for name, where in places.items()}
        report = Output.of("--report", places["report"], storage_options=options["report"])
        trace = Output.of("--trace", places["trace"], storage_options=options["trace"])
        if trace is not None:
            trace.refuse_stdout()
        return cls(report, trace, page_output(places["html"], options["html"]))

    @property
    def has_stdout(self) -> bool:
        """Whether standard output is for the report alone."""
        return self.report is not None and self.report.is_stdout

    def write(self, report: StageReport) -> None:
        """Raises StorageError, after all have been tried."""
        write_all(
            [
                (self.report, self._as_json(report)),
                (self.trace, lambda: chrome_trace(report)),
                (self.html, lambda: page_of(report)),
            ]
        )

    def write_failure(self, failed: FailedStage) -> None:
        """The report and the page of a run that failed; there is no trace of it."""
        write_all([(self.report, self._as_json(failed)), (self.html, lambda: page_of(failed))])

    def _as_json(self, report: StageReport | FailedStage) -> Callable[[], str]:
        return lambda: report.model_dump_json(indent=None if self.has_stdout else 2)


def run_stage(
    spec: Path,
    location: str | None,
    places: Mapping[str, str | None],
    *,
    address: str | None,
    num_gpus: int | None,
    command: str,
    interrupts: Interrupts,
) -> None:
    """Run a stage, write its reports, and print a summary.

    Args:
        location: of another checkpoint than the spec's.
        places: where the reports go, see `ReportOutputs.of`.
        address, num_gpus: as for `ray_for`.
        command: the command line, for the reports.
        interrupts: end the run.

    Raises:
        SpecError, LayoutError: the command or its spec is wrong; no report is written.
        ShardferryError: the work failed; the reports say how far it came.
    """
    config = StageConfig.from_file(spec)
    where = location or config.checkpoint.location
    outputs = ReportOutputs.of(places, config, where)
    layout = target_layout(config)
    run = _Run(config, layout, interrupts)
    try:
        done = run.to_the_end(location, address=address, num_gpus=num_gpus)
    except (SpecError, LayoutError):
        raise
    except (ShardferryError, OSError) as error:
        _tell_failure(outputs, run.failed(error, where or "", command))
        raise
    done = done.model_copy(update={"command": command})
    if not outputs.has_stdout:
        print_stage(done)
    outputs.write(done)


def _tell_failure(outputs: ReportOutputs, failed: FailedStage) -> None:
    """Write the reports of a failure. That they can't be written hides no failure."""
    try:
        outputs.write_failure(failed)
    except ShardferryError as error:
        print(f"warning: {error}", file=sys.stderr)


class _Run:
    """One run, and how far its ranks have come."""

    def __init__(self, config: StageConfig, layout: SpecLayout, interrupts: Interrupts) -> None:
        self._config = config
        self._layout = layout
        self._interrupts = interrupts
        self._started_s = time.monotonic()
        self._seen: list[Progress] = []
        self._moved_s: list[float] = []  # by rank: when its bytes were last seen to grow

    def to_the_end(self, location: str | None, *, address: str | None, num_gpus: int | None) -> StageReport:
        """Check, start, load, and take all down."""
        config, layout, request = self._config, self._layout, self._config.checkpoint.request()
        catalog = open_checkpoint_of(config, location)  # a wrong path is refused before a cluster is started
        check_checkpoint(catalog, request, on_other_nodes=reads_on_other_nodes(config, address))
        check_topology(catalog, layout, request)
        self._interrupts.check()
        with ray_for(config, layout.world_size, address=address, num_gpus=num_gpus), byte_progress("loading") as bar:

            def on_progress(ranks: list[Progress]) -> None:
                self._interrupts.check()
                self._look(ranks)
                show_ranks(bar, ranks)

            result = OptimizerLoadStage(config).run(location=catalog.location, on_progress=on_progress)
            done = result.report
            result.close()
        return done

    def _look(self, ranks: list[Progress]) -> None:
        now, before = time.monotonic(), self._seen
        moved = self._moved_s or [now] * len(ranks)
        if before:
            moved = [
                now if new.bytes_done > old.bytes_done else then
                for new, old, then in zip(ranks, before, moved, strict=True)
            ]
        self._seen, self._moved_s = ranks, moved

    def failed(self, error: Exception, location: str, command: str) -> FailedStage:
        """The report of a failure."""
        fields: dict[str, Any] = made_by()
        return FailedStage(
            location=location,
            optimizer_key=self._config.checkpoint.optimizer_key,
            world_size=self._layout.world_size,
            error=str(error),
            error_type=type(error).__name__,
            failed_ranks=list(error.world_ranks) if isinstance(error, RankError) else [],
            total_s=time.monotonic() - self._started_s,
            command=command,
            ranks=[
                RankProgress(
                    rank=rank,
                    bytes_done=seen.bytes_done,
                    bytes_needed=seen.bytes_total,
                    phase=seen.phase,
                    idle_s=None if 0 < seen.bytes_total <= seen.bytes_done else time.monotonic() - moved_s,
                )
                for rank, (seen, moved_s) in enumerate(zip(self._seen, self._moved_s, strict=True))
            ],
            **fields,
        )
