"""Live trainers as the source of a stage: what they hold after their last step, in another topology."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from shardferry.actors.guard import KeptRecord
from shardferry.actors.resident.live_source import hold_state, release
from shardferry.actors.resident.memory_storage import RECORD, SCHEME
from shardferry.errors import SpecError
from shardferry.pipeline.trainers.delivery import check_receivers
from shardferry.pipeline.waiting import Wait, dismiss, gather
from shardferry.plan.kept import index_of
from shardferry.schemas.stage_config import StageConfig


@contextmanager
def held_by(trainers: Sequence[Any], config: StageConfig) -> Iterator[StageConfig]:
    """The config of a stage that reads what trainers hold. At the end of the ``with`` they give the memory back.

    Args:
        trainers: the living ones, in any order: what they hold is found by what they say that it is.

    Raises:
        SpecError: they are no `shardferry.OptimizerReceiver`; the config has weights elsewhere.
        ShardferryError: a trainer can't be a source.
        RankError: a trainer died, or was late.
    """
    check_receivers(trainers, "shardferry_target")
    if config.checkpoint.model_location is not None:
        raise SpecError(
            f"checkpoint.model_location: {config.checkpoint.model_location} is given beside source, whose trainers hold the "
            "weights; leave out one of them"
        )
    stage, requests = uuid.uuid4().hex[:8], config.checkpoint.requests()
    asked: list[Any] = [
        trainer.__ray_call__.remote(hold_state, stage, rank, len(trainers), requests)
        for rank, trainer in enumerate(trainers)
    ]
    try:
        timeout_s = config.timeouts.handoff_s
        manifests = gather(
            asked, Wait("copying what the trainers hold", timeout_s, "timeouts.handoff_s", "source trainer")
        )
        record = KeptRecord(
            name=stage,
            stage=stage,
            ttl_s=timeout_s,
            location=f"{SCHEME}{stage}",
            optimizer_key=config.checkpoint.optimizer_key,
            topology=f"{len(trainers)} live trainers",
            nodes=[""] * len(trainers),
            nbytes=[0] * len(trainers),
            files=index_of(manifests).files(),
            holders=list(trainers),
        )
        checkpoint = config.checkpoint.model_copy(
            update={"location": record.location, "storage_options": {RECORD: record}, "cache": None}
        )
        yield config.model_copy(update={"checkpoint": checkpoint})
    finally:
        dismiss([*asked, *(trainer.__ray_call__.remote(release, stage) for trainer in trainers)])
