"""A running stage: one ObjectRef per rank at once, and the result when all ranks are loaded."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ray

from shardferry.actors.loader_group import LoaderGroup
from shardferry.actors.progress import Progress
from shardferry.errors import RankError
from shardferry.handoff.handle import ShardHandle
from shardferry.handoff.transports import transport_named
from shardferry.layout.spec import SpecLayout
from shardferry.pipeline.reports import build_report, told_by_trainers
from shardferry.pipeline.waiting import Wait, gather
from shardferry.schemas.stage_config import StageConfig
from shardferry.schemas.stage_report import StageReport

ProgressCallback = Callable[[list[Progress]], None]
_PROGRESS_EVERY_S = 0.5


@dataclass(frozen=True)
class Refs:
    """The ObjectRefs of one stage."""

    location: Any  # str, or an ObjectRef of one
    catalog: ray.ObjectRef[Any]
    receptions: Sequence[ray.ObjectRef[Any]]  # of each trainer's `Reception`, by rank; empty without trainers
    reports: Sequence[ray.ObjectRef[Any]]  # of each rank's `RankReport`, by rank
    handles: Sequence[ray.ObjectRef[Any]]  # of each rank's `ShardHandle`, by rank


@dataclass(frozen=True)
class Submission:
    """A submitted stage: its config, its loaders, and what they will return."""

    config: StageConfig
    group: LoaderGroup
    refs: Refs
    layout: SpecLayout | None  # None: the trainers' layouts


class Loading:
    """A running stage. Picklable; keep it (or its result) until the trainers have opened their shards.

    Attributes:
        refs: one ObjectRef of a `shardferry.ShardHandle` for each target rank. Pass ``refs[rank]`` to that trainer's
            method: Ray resolves it when the shard is loaded.
        submission: what runs.
    """

    def __init__(self, submission: Submission) -> None:
        self.refs = list(submission.refs.handles)
        self.submission = submission
        self._submitted = time.time()
        self._watcher: _Watcher | None = _Watcher(submission)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_watcher": None}  # its thread stays in the submitting process, which owns the loaders

    def __del__(self) -> None:
        watcher: _Watcher | None = getattr(self, "_watcher", None)
        if watcher is not None:
            watcher.abandon()

    def wait(self, timeout: float | None = None, *, on_progress: ProgressCallback | None = None) -> None:
        """Return when every rank is loaded.

        Args:
            timeout: seconds; default: the deadlines of the spec.
            on_progress: called twice a second with every rank's progress.

        Raises:
            ShardferryError: a rank failed; the loaders are taken down.
            RankError: a rank died, or was not done before a deadline of the spec.
            TimeoutError: ``timeout`` has passed; the stage still runs.
        """
        if self._watcher is None:  # in another process than the submitting one
            watch(self.submission)
            return
        poll = _ProgressPoll(self.submission.group, on_progress)
        if not self._watcher.join(timeout, poll):
            raise TimeoutError(f"the stage is not done after timeout = {timeout:g} s")

    def progress(self) -> list[Progress]:
        """Every rank's progress, by rank; zeros for ranks that haven't started."""
        return _ask_progress(self.submission.group)

    def result(self, timeout: float | None = None, *, on_progress: ProgressCallback | None = None) -> StageResult:
        """Wait, and return report and handles. Takes the arguments of `wait`, and raises as it does."""
        self.wait(timeout, on_progress=on_progress)
        return StageResult(self, {"start": self._start_s()})

    def close(self) -> None:
        """Take the loaders down and give their GPUs back. Opened shards stay valid."""
        self.submission.group.take_down()

    def _start_s(self) -> float:
        return self._watcher.started - self._submitted if self._watcher and self._watcher.started else 0.0


class StageResult:
    """A finished stage. Keep it until the trainers have opened their shards.

    Args:
        loading: keeps the loaders alive.
        driver_phases: seconds of the driver's phases, by name.
    """

    def __init__(self, loading: Loading, driver_phases: dict[str, float]) -> None:
        self._loading = loading
        self._driver_phases = driver_phases
        self._receipts: list[Any] = []

    def __enter__(self) -> StageResult:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @cached_property
    def report(self) -> StageReport:
        """Bytes, seconds and peak memory, per rank and in total."""
        submission = self._loading.submission
        refs, spec = submission.refs, submission.layout
        catalog, ranks = ray.get(refs.catalog), ray.get(list(refs.reports))
        receptions = ray.get(list(refs.receptions))
        layouts = [r.layout for r in receptions] or [spec.rank(rank) for rank in range(len(ranks)) if spec is not None]
        report = build_report(submission.config, catalog, layouts, ranks, self._driver_phases)
        told = told_by_trainers(self._receipts)
        return report.model_copy(update={**told, "warnings": [*report.warnings, *told["warnings"]]})

    @cached_property
    def handles(self) -> list[ShardHandle]:
        """One handle for each target rank. With the transport ``object_store`` this fetches the shards' bytes."""
        return ray.get(self._loading.refs)

    def final_progress(self) -> list[Progress]:
        """The progress of each rank when it has loaded all its bytes, by rank."""
        return [Progress(rank.bytes_needed, rank.bytes_needed) for rank in self.report.ranks]

    def add_phase(self, name: str, seconds: float) -> None:
        """Add seconds of a phase of the driver to the report. Call it before the first use of `report`."""
        self._driver_phases[name] = seconds

    def add_receipts(self, receipts: Sequence[Any]) -> None:
        """Add what the trainers answered to their shards, by rank. Call it before the first use of `report`."""
        self._receipts += receipts

    def close(self) -> None:
        """Take the loaders down and give their GPUs back. Opened shards stay valid."""
        self._loading.close()


def watch(submission: Submission, *, on_start: Callable[[], None] = lambda: None) -> None:
    """Wait until every rank is loaded. On a failure, take all loaders down.

    Args:
        on_start: called when all loaders have joined the process group.

    Raises:
        ShardferryError: the first failure, as `waiting.gather` reports it.
    """
    group, refs, timeouts = submission.group, submission.refs, submission.config.timeouts

    def resources() -> str:
        return (
            f"; the cluster has {_amounts(ray.cluster_resources())}, free are {_amounts(ray.available_resources())}, "
            f"each rank needs {group.bundles.bundle_specs[0]}"
        )

    try:
        gather(group.joined, Wait("starting the loaders", timeouts.start_s, "timeouts.start_s", resources))
        on_start()
        gather(refs.receptions, Wait("asking the trainers for their layout", timeouts.start_s, "timeouts.start_s"))
        if isinstance(refs.location, ray.ObjectRef):
            gather([refs.location], Wait("waiting for the checkpoint's location", timeouts.load_s, "timeouts.load_s"))
        reports = gather(refs.reports, Wait("loading", timeouts.load_s, "timeouts.load_s"))
        _wait_for_handles(refs.handles, timeouts.handoff_s)
        if all(transport_named(report.transport).outlives_loader for report in reports):
            group.take_down()  # the shards don't need their loaders any more: the GPUs are free for other work
    except BaseException:
        group.take_down()
        raise


def _wait_for_handles(handles: Sequence[ray.ObjectRef[Any]], timeout_s: float) -> None:
    _, late = ray.wait(list(handles), num_returns=len(handles), timeout=timeout_s, fetch_local=False)
    if late:
        raise RankError(
            f"making the shards' handles: {len(late)} of {len(handles)} were not done within "
            f"timeouts.handoff_s = {timeout_s:g} s",
            [rank for rank, handle in enumerate(handles) if handle in late],
        )


def _amounts(resources: dict[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in ("GPU", "CPU"))


class _Watcher:
    """Watches a stage in a thread of the submitting process: a failed rank takes the others down, even if nobody waits."""

    def __init__(self, submission: Submission) -> None:
        self.started = 0.0
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._abandoned = self._finished = False
        self._submission = submission  # not its `Loading`, which would then never be deleted
        self._thread = threading.Thread(target=self._watch, daemon=True, name="shardferry-watch")
        self._thread.start()

    def join(self, timeout: float | None, poll: _ProgressPoll) -> bool:
        """Whether the stage is done before ``timeout`` (seconds). Raises the stage's failure."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._thread.is_alive():
            remaining = _PROGRESS_EVERY_S if deadline is None else min(_PROGRESS_EVERY_S, deadline - time.monotonic())
            if remaining <= 0:
                return False
            self._thread.join(remaining)
            poll()
        if self._error is not None:
            raise self._error
        return True

    def abandon(self) -> None:
        """The `Loading` was deleted: take the loaders down as soon as the handles exist that its refs promise."""
        with self._lock:
            self._abandoned = True
            if not self._finished:
                return
        self._submission.group.take_down()

    def _watch(self) -> None:
        try:
            watch(self._submission, on_start=self._note_start)
        except BaseException as error:  # raised again by join
            self._error = error
        with self._lock:
            self._finished = True
            if not self._abandoned:
                return
        self._submission.group.take_down()

    def _note_start(self) -> None:
        self.started = time.time()


class _ProgressPoll:
    """Calls back with every rank's progress; zeros for ranks that don't answer."""

    def __init__(self, group: LoaderGroup, callback: ProgressCallback | None) -> None:
        self._group = group
        self._callback = callback

    def __call__(self) -> None:
        if self._callback is not None:
            self._callback(_ask_progress(self._group))


def _ask_progress(group: LoaderGroup) -> list[Progress]:
    asked = group.ask_progress()
    ready, _ = ray.wait(asked, num_returns=len(asked), timeout=_PROGRESS_EVERY_S)
    answers: list[Progress] = []
    for ref in asked:
        try:
            answers.append(ray.get(ref) if ref in ready else Progress(0, 0))
        except ray.exceptions.RayError:  # the watcher tells why the rank is gone
            answers.append(Progress(0, 0))
    return answers
