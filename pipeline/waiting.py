"""Wait for one result a rank: with a deadline, and with one error for many failures."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from shardferry.errors import RankError, ShardferryError

_GRACE_S = 2.0  # after the first failure: others may tell more about its cause
_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class Wait:
    """What is waited for, in words for the error."""

    doing: str  # "loading"
    timeout_s: float
    setting: str  # the field of the spec that sets the deadline
    hint: Callable[[], str] = lambda: ""  # looked up when the deadline has passed


def gather(refs: Sequence[ray.ObjectRef[Any]], wait: Wait, *, on_poll: Callable[[], None] = lambda: None) -> list[Any]:
    """The (small) results of all ranks, by rank. The first failure ends the wait.

    Raises:
        ShardferryError: the failure of a rank, as the rank raised it.
        RankError: a rank died, failed in another way, or was not done before the deadline.
    """
    deadline = time.monotonic() + wait.timeout_s
    rank_of = {ref: rank for rank, ref in enumerate(refs)}
    pending = list(refs)
    values: dict[int, Any] = {}
    failures: dict[int, RayError] = {}
    while pending:
        remaining = deadline - time.monotonic()
        ready, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, min(_POLL_S, remaining)), fetch_local=False)
        on_poll()
        for ref in ready:
            try:
                values[rank_of[ref]] = ray.get(ref)
            except RayError as error:
                if not failures:
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
                failures[rank_of[ref]] = error
        if pending and not ready and remaining <= 0:
            break
    if failures:
        raise error_of(failures, wait)
    if pending:
        raise _late([rank_of[ref] for ref in pending], len(refs), wait)
    return [values[rank] for rank in range(len(refs))]


def _late(ranks: list[int], world_size: int, wait: Wait) -> RankError:
    named = ", ".join(map(str, ranks[:8])) + (" and others" if len(ranks) > 8 else "")
    return RankError(
        f"{wait.doing}: {len(ranks)} of {world_size} ranks ({named}) were not done within {wait.setting} = "
        f"{wait.timeout_s:g} s{wait.hint()}",
        ranks,
    )


def error_of(failures: dict[int, RayError], wait: Wait) -> Exception:
    """One error for the failures of several ranks: the one nearest to the cause.

    A dead process explains the broken collectives of the others; a rank's own error explains the errors of the ranks
    that only heard of it.
    """
    dead = {rank: error for rank, error in failures.items() if isinstance(error, RayActorError)}
    if dead:
        ranks = sorted(dead)
        reason = " ".join(str(dead[ranks[0]]).split())[:300]
        return RankError(f"{wait.doing}: the process of rank {', '.join(map(str, ranks))} died: {reason}", ranks)
    causes = {rank: _cause(error) for rank, error in failures.items()}
    own = {r: c for r, c in causes.items() if isinstance(c, ShardferryError) and not isinstance(c, RankError)}
    heard = {rank: cause for rank, cause in causes.items() if isinstance(cause, RankError)}
    for group in (own, heard):
        if group:
            return group[min(group)]
    ranks = sorted(causes)
    first = causes[ranks[0]]
    error = RankError(f"{wait.doing}: rank {', '.join(map(str, ranks))} failed: {type(first).__name__}: {first}", ranks)
    error.__cause__ = first
    return error


def _cause(error: RayError) -> BaseException:
    if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        return error.cause
    return error
