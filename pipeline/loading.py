"""A running stage: one ObjectRef per rank at once, and the result when all ranks are loaded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator
from typing import Any

import ray

from shardferry.actors.guard import kill_loaders
from shardferry.actors.loader_group import ask_progress
from shardferry.actors.progress import Progress
from shardferry.errors import LoadCancelled, RankError, without_terminal_codes
from shardferry.pipeline.drive import OUTCOME, STARTED, Started
from shardferry.pipeline.result import Outcome, StageResult
from shardferry.pipeline.waiting import cause_of, dismiss
from shardferry.schemas.stage_config import StageConfig

ProgressCallback = Callable[[list[Progress]], None]
_PROGRESS_EVERY_S = 0.5


class Loading:
    """A running stage. Picklable, and awaitable: ``await loading`` gives its result.

    A ref keeps the loader alive whose shard it names: nothing else of the stage needs to be kept.

    Args:
        name: the stage's.
        guard: holds the promises.
        world_size: None: known when the topology is.
    """

    def __init__(self, name: str, config: StageConfig, guard: Any, world_size: int | None) -> None:
        self.name = name
        self.config = config
        self._guard = guard
        self._started: Any = guard.promise.remote(STARTED)
        self._outcome: Any = guard.promise.remote(OUTCOME)
        self._refs: list[Any] | None = None if world_size is None else self._ask(world_size)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_refs": self.refs}

    def __await__(self) -> Generator[Any, None, StageResult]:
        return asyncio.to_thread(self.result).__await__()

    @property
    def refs(self) -> list[ray.ObjectRef[Any]]:
        """One ObjectRef of a `shardferry.ShardHandle` for each target rank.

        Pass ``refs[rank]`` to that trainer's method: Ray resolves it when the shard is loaded. Cancelling one (`ray.cancel`)
        cancels the stage. Where the topology is an ObjectRef, this waits until it is known.
        """
        if self._refs is None:
            self._refs = self._ask(self.started().placement.world_size)
        return self._refs

    def _ask(self, world_size: int) -> list[Any]:
        return [self._guard.promise.remote(rank) for rank in range(world_size)]

    def started(self) -> Started:
        """Where the loaders run, once all have joined the process group. Raises as `wait`."""
        found: Started = _get(self._started)
        return found

    def beside(self, rank: int) -> Any:
        """The scheduling strategy of an actor that is to run where a rank's loader runs; waits until the loaders have started.

        ```python
        Trainer.options(num_gpus=0.5, scheduling_strategy=loading.beside(rank)).remote(loading.refs[rank])
        ```

        """
        started = self.started()
        return started.placement.beside(rank, started.joined[rank].node_id)

    def wait(self, timeout: float | None = None, *, on_progress: ProgressCallback | None = None) -> None:
        """Return when every rank is loaded.

        Args:
            timeout: seconds; default: the deadlines of the spec.
            on_progress: called twice a second with every rank's progress, and once when all is loaded.

        Raises:
            ShardferryError: a rank failed; the loaders are taken down.
            RankError: a rank died, or was not done before a deadline of the spec.
            LoadCancelled: it was cancelled.
            TimeoutError: ``timeout`` has passed; the stage still runs.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            remaining = _PROGRESS_EVERY_S if deadline is None else min(_PROGRESS_EVERY_S, deadline - time.monotonic())
            if ray.wait([self._outcome], timeout=max(0.0, remaining))[0]:
                try:
                    outcome: Outcome = _get(self._outcome)
                except BaseException:
                    dismiss([self._started, *(self._refs or ())])
                    raise
                if on_progress is not None:
                    on_progress([Progress(rank.bytes_needed, rank.bytes_needed) for rank in outcome.reports])
                return
            if remaining <= 0:
                raise TimeoutError(f"the stage is not done after timeout = {timeout:g} s")
            if on_progress is not None:
                on_progress(self.progress())

    def progress(self) -> list[Progress]:
        """Every rank's progress, by rank; zeros for ranks that haven't started."""
        return ask_progress(self.name, 0 if self._refs is None else len(self._refs))

    def result(self, timeout: float | None = None, *, on_progress: ProgressCallback | None = None) -> StageResult:
        """Wait, and return report and handles. Takes the arguments of `wait`, and raises as it does."""
        self.wait(timeout, on_progress=on_progress)
        return StageResult(self.config, _get(self._outcome), refs=self.refs, close=self.close)

    def cancel(self) -> None:
        """Stop the reads and take the loaders down; `wait` raises LoadCancelled. Opened shards stay valid.

        State that is kept and complete stays: `shardferry kept --drop` gives its memory back.
        """
        self._guard.fail.remote(LoadCancelled("the load was cancelled"))
        if self.config.handoff.keep is None:
            kill_loaders(self.name)

    close = cancel


def _get(ref: ray.ObjectRef[Any]) -> Any:
    """A promised value. Raises the stage's error."""
    try:
        return ray.get(ref)
    except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
        raise RankError(
            f"the stage ended: its guard or the process that submitted it has died. Ray says: {without_terminal_codes(str(error))}"
        ) from error
    except ray.exceptions.TaskCancelledError:
        raise LoadCancelled("the load was cancelled") from None
    except ray.exceptions.RayTaskError as error:
        raise cause_of(error) from None
