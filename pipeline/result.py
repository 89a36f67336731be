"""The result of a finished stage: the shards' handles, and the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ray

from shardferry.handoff.handle import ShardHandle
from shardferry.layout.spec import SpecLayout
from shardferry.pipeline.reports import build_report, told_by_trainers, with_installs
from shardferry.receiver import Reception, WantedPart
from shardferry.schemas.stage_config import StageConfig
from shardferry.schemas.stage_report import RankReport, StageReport


@dataclass(frozen=True)
class Outcome:
    """What a stage has loaded."""

    phases: Mapping[str, float]  # seconds of the driver's phases, by name
    catalog: ray.ObjectRef[Any]
    target: SpecLayout | Sequence[ray.ObjectRef[Any]]  # the topology, or the trainers' receptions by rank
    reports: Sequence[RankReport]  # by rank


class StageResult:
    """A finished stage. Keep it, or its handles, until the trainers have opened their shards.

    Args:
        refs: of the shards' handles, by rank.
        close: takes the loaders down.
    """

    def __init__(
        self,
        config: StageConfig,
        outcome: Outcome,
        *,
        refs: Sequence[ray.ObjectRef[Any]] = (),
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self._config = config
        self._outcome = outcome
        self._refs = list(refs)
        self.close = close
        self._driver_phases = dict(outcome.phases)
        self._receipts: list[Any] = []

    def __enter__(self) -> StageResult:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @cached_property
    def report(self) -> StageReport:
        """Bytes, seconds and peak memory, per rank and in total."""
        outcome = self._outcome
        parts = [self._parts(rank) for rank in range(len(outcome.reports))]
        ranks = with_installs(outcome.reports, self._receipts)
        report = build_report(self._config, ray.get(outcome.catalog), parts, ranks, self._driver_phases)
        told = told_by_trainers(self._receipts)
        return report.model_copy(update={**told, "warnings": [*report.warnings, *told["warnings"]]})

    def _parts(self, rank: int) -> Sequence[WantedPart]:
        target = self._outcome.target
        if isinstance(target, SpecLayout):
            return [WantedPart(None, target.rank(rank))]
        return self.receptions[rank].parts

    @cached_property
    def receptions(self) -> list[Reception]:
        """What each trainer wants, by rank; none without trainers."""
        target = self._outcome.target
        return [] if isinstance(target, SpecLayout) else ray.get(list(target))

    @cached_property
    def handles(self) -> list[ShardHandle]:
        """One handle for each target rank; none where the trainers have loaded themselves."""
        return ray.get(self._refs)

    def add_phase(self, name: str, seconds: float) -> None:
        """Add seconds of a phase of the driver to the report. Call it before the first use of `report`."""
        self._driver_phases[name] = seconds

    def add_receipts(self, receipts: Sequence[Any]) -> None:
        """Add what the trainers answered to their shards, by rank. Call it before the first use of `report`."""
        self._receipts += receipts
