"""Run a stage inside its trainers: no loaders, each trainer loads its own share over the trainers' process group."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.actor import ActorHandle

from shardferry.actors.in_trainer import load_in_trainer
from shardferry.actors.rank_report import rank_report
from shardferry.errors import SpecError
from shardferry.pipeline.drive import check_load
from shardferry.pipeline.preflight import opened
from shardferry.pipeline.result import Outcome, StageResult
from shardferry.pipeline.trainers.delivery import check_receivers
from shardferry.pipeline.waiting import Wait, gather
from shardferry.schemas.stage_config import StageConfig


def run_in_process(config: StageConfig, trainers: Sequence[ActorHandle[Any]] | None, location: Any) -> StageResult:
    """Load in the trainers, on all or on none.

    Args:
        location: of the checkpoint, or an ObjectRef of it.

    Raises:
        SpecError: there are no trainers, or they are no `shardferry.OptimizerReceiver`.
        ShardferryError: as `shardferry.load_optimizer_state` does. Nothing was changed.
        RankError: a trainer died, or was late.
    """
    if trainers is None:
        raise SpecError("handoff.transport: in_process loads inside the trainers, and none were given")
    check_receivers(trainers, "shardferry_layout", "shardferry_target")
    spec, timeouts = config.checkpoint, config.timeouts
    if isinstance(location, ray.ObjectRef):
        wait = Wait("waiting for the checkpoint's location", timeouts.load_s, "timeouts.load_s", "upstream task")
        (location,) = gather([location], wait)
    start = time.time()
    catalog = opened(config, location)
    receptions = [trainer.shardferry_layout.remote(rank, len(trainers)) for rank, trainer in enumerate(trainers)]
    found = gather(
        receptions, Wait("asking the trainers for their layout", timeouts.start_s, "timeouts.start_s", "trainer")
    )
    check_load(config, catalog, found)
    load_start, read = time.time(), config.read.options(timeouts.load_s)
    receipts = gather(
        [
            trainer.__ray_call__.remote(load_in_trainer, location, spec.requests(), spec.options_for(location), read)
            for trainer in trainers
        ],
        Wait("loading in the trainers", timeouts.load_s, "timeouts.load_s", "trainer"),
    )
    reports = [
        rank_report(
            receipt["figures"],
            receipt["measures"],
            rank=rank,
            transport="in_process",
            before=(),
            load_start=load_start,
        )
        for rank, receipt in enumerate(receipts)
    ]
    result = StageResult(config, Outcome({"start": load_start - start}, ray.put(catalog), receptions, reports))
    result.add_receipts(receipts)
    return result
