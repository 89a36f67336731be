"""Attach to one rank's part of kept state. Where its loader has died, another one reads the part again from storage."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import ray

from shardferry.actors.guard import NAMESPACE, KeptRecord, loader_name
from shardferry.actors.loader import Reread
from shardferry.actors.loader_group import PROGRESS, start_again
from shardferry.arena import host_identity
from shardferry.errors import HandoffError
from shardferry.handoff.handle import ShardHandle

_ANSWER_S = 30.0  # of a guard


def handle_of(record: KeptRecord, guard: Any, rank: int) -> tuple[Any, ShardHandle]:
    """The loader of a rank, and a handle of its part, which `shardferry.actors.loader_group.completed` completes.

    Whoever finds the loader dead starts another one under its name; all others who attach wait for that one.

    Raises:
        HandoffError: the loader has died, and its part could not be read again.
    """
    for left in reversed(range(record.retries + 1)):
        with suppress(ValueError, ray.exceptions.RayActorError):  # it has died
            loader: Any = ray.get_actor(loader_name(record.stage, rank), NAMESPACE)
            asked = loader.handle_for.options(concurrency_group=PROGRESS).remote(host_identity())
            if (handle := _answer(asked, record, rank)) is not None:
                return loader, handle
        if left:
            with suppress(ray.exceptions.RayActorError):  # the new one has died too, or another who waits has given up
                record.nodes[rank] = _restored(record, guard, rank)
    raise lost(record, rank, is_final=True)


def _answer(asked: Any, record: KeptRecord, rank: int) -> ShardHandle | None:
    try:
        found: ShardHandle | None = ray.get(asked, timeout=record.start_s)
    except ray.exceptions.GetTimeoutError as error:
        raise HandoffError(
            f"{record.name!r}: the loader of rank {rank} on {record.nodes[rank]} has not answered within timeouts.start_s = "
            f"{record.start_s:g} s; is its node down or stopped? Attach again"
        ) from error
    return found


def _restored(record: KeptRecord, guard: Any, rank: int) -> str:
    """Let a loader read a rank's part again; returns its node. Raises HandoffError, and RayActorError: it has died."""
    reread: Reread = ray.get(guard.reread.remote(rank), timeout=_ANSWER_S)
    loader: Any = start_again(reread.settings)
    timeout_s = reread.settings.start_timeout_s + reread.settings.load_timeout_s
    try:
        node: str = ray.get(loader.restore.remote(reread), timeout=timeout_s)
    except (ray.exceptions.RayTaskError, ray.exceptions.GetTimeoutError) as error:
        ray.kill(loader)  # so that the rank counts as lost, and the next who attaches tries again
        late = f"it was not done within timeouts.start_s + timeouts.load_s = {timeout_s:g} s"
        reason = error.cause if isinstance(error, ray.exceptions.RayTaskError) else late
        raise HandoffError(
            f"{record.name!r}: the loader of rank {rank} on {record.nodes[rank]} has died, and its part can't be read again from "
            f"{record.location}: {reason}. Drop the name, and load from another checkpoint"
        ) from error
    ray.get(guard.moved.remote(rank, node), timeout=_ANSWER_S)
    return node


def lost(record: KeptRecord, rank: int, *, is_final: bool = False) -> HandoffError:
    """The error for a rank whose loader has died.

    Args:
        is_final: it was read again as often as it may be.
    """
    way_out = (
        f"Load that rank from {record.location}, or drop the name and load again"
        if is_final or not record.retries
        else f"`shardferry.attach({record.name!r}, {rank})` reads it again from {record.location}"
    )
    return HandoffError(
        f"{record.name!r}: the loader of rank {rank} on {record.nodes[rank]} has died, and its part of the state with it; the "
        f"others are there. {way_out}"
    )
