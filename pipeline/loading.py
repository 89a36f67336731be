"""A stage under way: one ObjectRef a rank now, a result later."""

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
from shardferry.pipeline.reporting import build_report
from shardferry.pipeline.waiting import Wait, gather
from shardferry.schemas.stage_config import StageConfig
from shardferry.schemas.stage_report import StageReport

ProgressCallback = Callable[[list[Progress]], None]
_PROGRESS_EVERY_S = 0.5


@dataclass(frozen=True)
class Refs:
    """Everything that Ray has promised for one stage."""

    location: Any  # str, or an ObjectRef of one
    catalog: ray.ObjectRef[Any]
    receptions: Sequence[ray.ObjectRef[Any]]  # of the trainers, by rank; none without trainers
    reports: Sequence[ray.ObjectRef[Any]]  # by rank
    handles: Sequence[ray.ObjectRef[Any]]  # by rank


class Loading:
    """A stage under way. Picklable; keep it (or its result) until the trainers have opened their shards.

    Attributes:
        refs: one ObjectRef of a `shardferry.ShardHandle` for each target rank. Pass ``refs[rank]`` to that trainer's
            method: Ray resolves it when the shard is loaded.
    """

    def __init__(self, config: StageConfig, group: LoaderGroup, refs: Refs, layout: SpecLayout | None) -> None:
        self.refs = list(refs.handles)
        self._config = config
        self._group = group
        self._promised = refs
        self._layout = layout
        self._submitted = time.time()
        self._watcher: _Watcher | None = _Watcher(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_watcher": None}  # a thread of the submitting process, which owns the loaders

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
            RankError: a rank died or was late.
            TimeoutError: ``timeout`` has passed; the stage goes on.
        """
        if self._watcher is None:  # in another process than the submitting one
            watch(self._config, self._group, self._promised)
            return
        poll = _ProgressPoll(self._group, on_progress)
        if not self._watcher.join(timeout, poll):
            raise TimeoutError(f"the stage is not done after timeout = {timeout:g} s")

    def progress(self) -> list[Progress]:
        """Every rank's progress, by rank; zeros for ranks that haven't started."""
        return _ask_progress(self._group)

    def result(self, timeout: float | None = None, *, on_progress: ProgressCallback | None = None) -> StageResult:
        """Wait, then give report and handles. Raises as `wait` does."""
        self.wait(timeout, on_progress=on_progress)
        return StageResult(self, {"start": self._start_s()})

    def close(self) -> None:
        """Take the loaders down and give their GPUs back. Shards that were opened live on."""
        self._group.take_down()

    def _start_s(self) -> float:
        return self._watcher.started - self._submitted if self._watcher and self._watcher.started else 0.0


class StageResult:
    """A finished stage. Keep it until the trainers have opened their shards."""

    def __init__(self, loading: Loading, driver_phases: dict[str, float]) -> None:
        self._loading = loading
        self._driver_phases = driver_phases

    def __enter__(self) -> StageResult:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @cached_property
    def report(self) -> StageReport:
        """Bytes, seconds, peaks, per rank and in all."""
        promised = self._loading._promised
        catalog, ranks = ray.get(promised.catalog), ray.get(list(promised.reports))
        spec = self._loading._layout
        receptions = ray.get(list(promised.receptions))
        layouts = [r.layout for r in receptions] or [spec.rank(rank) for rank in range(len(ranks)) if spec is not None]
        return build_report(self._loading._config, catalog, layouts, ranks, self._driver_phases)

    @cached_property
    def handles(self) -> list[ShardHandle]:
        """One handle for each target rank. Where they go through the object store, this fetches their bytes."""
        return ray.get(self._loading.refs)

    def final_progress(self) -> list[Progress]:
        """Every rank done."""
        return [Progress(rank.bytes_needed, rank.bytes_needed) for rank in self.report.ranks]

    def add_phase(self, name: str, seconds: float) -> None:
        """Count a phase of the driver's into the report."""
        self._driver_phases[name] = seconds

    def close(self) -> None:
        """Take the loaders down and give their GPUs back. Shards that were opened live on."""
        self._loading.close()


def watch(config: StageConfig, group: LoaderGroup, refs: Refs, *, on_start: Callable[[], None] = lambda: None) -> None:
    """Wait until every rank is loaded, or take all loaders down and raise what happened first."""
    timeouts = config.timeouts

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
            group.take_down()  # the shards don't need their loaders any more: the GPUs can go to others
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
    """Watches a stage in the submitting process, so that a failed rank takes the others down though nobody waits yet."""

    def __init__(self, loading: Loading) -> None:
        self.started = 0.0
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._abandoned = self._finished = False
        config, group, refs = loading._config, loading._group, loading._promised  # not `loading`: it may be forgotten
        self._group = group
        self._thread = threading.Thread(
            target=self._watch, args=(config, group, refs), daemon=True, name="shardferry-watch"
        )
        self._thread.start()

    def join(self, timeout: float | None, poll: _ProgressPoll) -> bool:
        """False where the stage is not done in time. Raises what the stage raised."""
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
        """Nobody holds the stage any more: take the loaders down once the refs that were given out are made."""
        with self._lock:
            self._abandoned = True
            if not self._finished:
                return
        self._group.take_down()

    def _watch(self, config: StageConfig, group: LoaderGroup, refs: Refs) -> None:
        try:
            watch(config, group, refs, on_start=self._note_start)
        except BaseException as error:  # raised again by join
            self._error = error
        with self._lock:
            self._finished = True
            if not self._abandoned:
                return
        group.take_down()

    def _note_start(self) -> None:
        self.started = time.time()


class _ProgressPoll:
    """Calls back with every rank's progress, as long as that can be known."""

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
