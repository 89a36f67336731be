"""Wait for one result per rank, with a deadline, and raise one error for the failures of many ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from shardferry.errors import LoadCancelled, RankError, ShardferryError, without_terminal_codes

_GRACE_S = 2.0  # after the first failure: another rank may report its cause
_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class Wait:
    """A wait and its deadline, in words for the error."""

    doing: str  # "loading"
    timeout_s: float
    setting: str  # the field of the spec that sets the deadline
    who: str = "loader"  # whose results: "the loader of rank 3"
    hint: Callable[[Sequence[int]], str] = lambda ranks: ""  # end of the message, given the late ranks
    places: Sequence[str] = ()  # by rank: the node, where it is known
    alarms: Sequence[ray.ObjectRef[Any]] = ()  # one of them is ready when the stage was cancelled

    def names(self, ranks: Sequence[int]) -> str:
        """Ranks in words: ``the loader of rank 3 on 10.0.0.7``."""
        shown = [f"{rank} on {self.places[rank]}" if self.places else str(rank) for rank in ranks[:8]]
        return f"the {self.who} of rank {', '.join(shown)}" + (" and others" if len(ranks) > 8 else "")


def gather(refs: Sequence[ray.ObjectRef[Any]], wait: Wait) -> list[Any]:
    """Wait for the results of all ranks. The first failure ends the wait.

    Args:
        refs: of results, by rank. The results should be small.

    Returns:
        The results, by rank.

    Raises:
        ShardferryError: the failure of a rank, as the rank raised it.
        RankError: a rank died, failed in another way, or was not done before the deadline.
        LoadCancelled: the stage was cancelled.
    """
    deadline = time.monotonic() + wait.timeout_s
    rank_of = {ref: rank for rank, ref in enumerate(refs)}
    pending = list(refs)
    values: dict[int, Any] = {}
    failures: dict[int, RayError] = {}
    while pending:
        remaining = deadline - time.monotonic()
        ready, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, min(_POLL_S, remaining)), fetch_local=False)
        for ref in ready:
            try:
                values[rank_of[ref]] = ray.get(ref)
            except RayError as error:
                if not failures:
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
                failures[rank_of[ref]] = error
        if wait.alarms and ray.wait(list(wait.alarms), timeout=0, fetch_local=False)[0]:
            raise LoadCancelled("the load was cancelled")
        if pending and not ready and remaining <= 0:
            break
    if failures:
        raise error_of(failures, wait)
    if pending:
        raise _timed_out(sorted(rank_of[ref] for ref in pending), len(refs), wait)
    return [values[rank] for rank in range(len(refs))]


def _timed_out(ranks: list[int], world_size: int, wait: Wait) -> RankError:
    named = ", ".join(map(str, ranks[:8])) + (" and others" if len(ranks) > 8 else "")
    return RankError(
        f"{wait.doing}: {len(ranks)} of {world_size} ranks ({named}) were not done within {wait.setting} = "
        f"{wait.timeout_s:g} s{wait.hint(ranks)}",
        ranks,
    )


def dismiss(refs: Sequence[ray.ObjectRef[Any]]) -> None:
    """Look at results that nobody will use: Ray prints pages about each error that nobody has looked at."""
    ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=_GRACE_S, fetch_local=False) if refs else ([], [])
    for ref in ready:
        with suppress(RayError):
            ray.get(ref)


def error_of(failures: dict[int, RayError], wait: Wait) -> Exception:
    """The one error that is nearest to the cause of several ranks' failures.

    A dead process is the cause of the broken collectives of other ranks. A rank's own error is the cause of the
    RankErrors of the ranks to which it was reported.

    Args:
        failures: by rank.
    """
    dead = {rank: error for rank, error in failures.items() if isinstance(error, RayActorError)}
    if dead:
        ranks = sorted(dead)
        reason = " ".join(without_terminal_codes(str(dead[ranks[0]])).split())
        return RankError(f"{wait.doing}: {wait.names(ranks)} died. Ray says: {reason}", ranks)
    causes = {rank: cause_of(error) for rank, error in failures.items()}
    own = {r: c for r, c in causes.items() if isinstance(c, ShardferryError) and not isinstance(c, RankError)}
    reported = {rank: cause for rank, cause in causes.items() if isinstance(cause, RankError)}
    for errors in (own, reported):
        if errors:
            return errors[min(errors)]
    ranks = sorted(causes)
    first = causes[ranks[0]]
    error = RankError(f"{wait.doing}: {wait.names(ranks)} failed: {type(first).__name__}: {first}", ranks)
    error.__cause__ = first
    return error


def cause_of(error: BaseException) -> Exception:
    """What a remote call has raised, without Ray's wrapping."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        return error.cause
    return error if isinstance(error, Exception) else RuntimeError(str(error))
