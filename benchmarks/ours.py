"""Shardferry as a contender: what a job's ranks do, with each strategy of reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist

from benchmarks.checkpoint import OPTIMIZER_KEY
from benchmarks.meter import Spent
from benchmarks.task import POISON, Contender, Task, WrongResult
from shardferry.arena import HostArena
from shardferry.checkpoint.open import METADATA_FILE, open_checkpoint
from shardferry.config import LoadRequest, ReadOptions, Strategy
from shardferry.exchange.agreement import Agreement
from shardferry.load import LoadJob, arena_for, load_rank, open_for_all
from shardferry.plan.load_plan import LoadPlan
from shardferry.plan.planner import plan_load
from shardferry.state_dicts import ParamGroup
from shardferry.stats import Counters, PhaseClock
from shardferry.storage.open import open_storage

_REQUEST = LoadRequest(OPTIMIZER_KEY)


class Shardferry(Contender):
    """What a job does: rank 0 opens the checkpoint, all get its catalog; each plans, then reads into its arena."""

    name = "Shardferry"
    strategy: ClassVar[Strategy] = "auto"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._layout = task.case.spec().rank(task.rank)
        self._plan: LoadPlan | None = None
        self._arena: HostArena | None = None
        self._param_groups: Sequence[ParamGroup] = ()

    def prepare(self) -> None:
        catalog = open_checkpoint(self._task.store.directory)
        plan = plan_load(catalog, self._layout, _REQUEST)
        arena = arena_for(plan, catalog)
        arena.tensor(0, (plan.arena_bytes // 4,), torch.float32).fill_(POISON)
        self._arena = arena

    def load(self) -> None:
        agreement = Agreement(dist.group.WORLD)
        self._counters, self._clock = Counters(), PhaseClock()
        options, location = ReadOptions(strategy=self.strategy), self._task.store.location
        with closing(open_storage(location)) as storage:
            with self._clock.phase("open"):
                catalog, values = open_for_all(storage, agreement, _REQUEST, options, self._counters)
            job = LoadJob(catalog, self._layout, _REQUEST, torch.device("cpu"), options, stays_here=True)
            loaded = load_rank(
                job, agreement, counters=self._counters, arena=self._arena, values=values, storage=storage
            )
        assert isinstance(loaded.arena, HostArena)
        self._plan, self._arena = loaded.plan, loaded.arena
        self._param_groups = loaded.manifest.param_groups
        self._clock.seconds.update(loaded.seconds)

    def check(self) -> None:
        assert self._plan is not None
        assert self._arena is not None
        for planned in self._plan.tensors:
            tensor = self._arena.tensor(planned.arena_offset, planned.layout.local_shape, planned.dtype)
            if planned.name == "step":
                self._task.check_step(self.name, planned.fqn, tensor)
            else:
                self._task.check(self.name, planned.fqn, planned.name, tensor)
        if len(self._plan.tensors) != len(self._task.expected) + len(self._task.shapes):
            raise WrongResult(f"{self.name}, {self._task.case.name}: {len(self._plan.tensors)} tensors were planned")
        self._task.check_groups(self.name, self._param_groups)

    def release(self) -> None:
        if self._arena is not None:
            self._arena.close()
        self._plan, self._arena, self._param_groups = None, None, ()

    def asked_of_storage(self, spent: Spent) -> tuple[int, int]:
        """As its own counters have it, since reads through a mapping are in none of the kernel's; and the metadata."""
        metadata = Path(self._task.store.directory, METADATA_FILE).stat().st_size if self._task.rank == 0 else 0
        return self._counters.bytes_requested + metadata, self._counters.num_requests + (1 if metadata else 0)

    def phases(self) -> Mapping[str, float]:
        return self._clock.seconds


class Direct(Shardferry):
    """Every rank reads for itself."""

    name = "Shardferry, direct"
    strategy: ClassVar[Strategy] = "direct"


class Cooperative(Shardferry):
    """The ranks of a node read for each other."""

    name = "Shardferry, cooperative"
    strategy: ClassVar[Strategy] = "cooperative"
