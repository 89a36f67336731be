"""Deliver loaded shards to the trainers: all of them or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.actor import ActorHandle

from shardferry.errors import SpecError
from shardferry.pipeline.waiting import Wait, dismiss, gather

Trainers = Sequence[ActorHandle[Any]]
_NEEDED = ("shardferry_layout", "shardferry_receive")
_STEPS = ("shardferry_fit", "shardferry_install", "shardferry_settle")


def check_receivers(trainers: Trainers, *needed: str) -> None:
    """Check, by the methods of their classes, that actors can receive shards. Raises SpecError."""
    if not trainers:
        raise SpecError("trainers: an empty list; give one actor per rank, or None to load by the spec's topology")
    for rank, trainer in enumerate(trainers):
        lacking = [name for name in needed or _NEEDED if not hasattr(trainer, name)]
        if lacking:
            raise SpecError(
                f"trainers[{rank}]: {trainer} has no method {' and no '.join(lacking)}; let its class inherit "
                "shardferry.OptimizerReceiver, or make the methods of shardferry.describe_layout and shardferry.receive"
            )


def deliver(trainers: Trainers, refs: Sequence[ray.ObjectRef[Any]], timeout_s: float, *, in_steps: bool) -> list[Any]:
    """Deliver each shard to its trainer.

    Args:
        refs: of the handles, by rank.
        timeout_s: for each of the steps.
        in_steps: all trainers check that their shard fits, then all install, and then all keep it. Where one of them fails,
            dies or is late, the others put back what they had. Otherwise `shardferry_receive` does all at once.

    Returns:
        The trainers' receipts, by rank.

    Raises:
        ShardferryError: of the rank that failed.
        RankError: a trainer died, or was late.
    """

    asked: list[Any] = []

    def step(doing: str, call: Callable[[int, Any], Any]) -> list[Any]:
        refs = [call(rank, trainer) for rank, trainer in enumerate(trainers)]
        asked.extend(refs)
        hint = "; a trainer that is busy in another method answers after it"
        return gather(refs, Wait(doing, timeout_s, "timeouts.handoff_s", "trainer", lambda ranks: hint))

    if not in_steps:
        return step("delivering to the trainers", lambda rank, t: t.shardferry_receive.remote(refs[rank]))
    try:
        step("fitting the shards to the trainers", lambda rank, t: t.shardferry_fit.remote(refs[rank]))
        step("installing the shards in the trainers", lambda rank, t: t.shardferry_install.remote())
    except BaseException:
        undone: list[Any] = [trainer.shardferry_settle.remote(keep=False) for trainer in trainers]
        ray.wait(undone, num_returns=len(undone), timeout=timeout_s)
        dismiss([*asked, *undone])
        raise
    return step("settling the trainers", lambda rank, t: t.shardferry_settle.remote(keep=True))
