"""Let the ranks of a process group agree before each goes on: all go on, or all raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from shardferry.errors import RankError, ShardferryError

T = TypeVar("T")


class Agreement:
    """A meeting point of the ranks of a group; trivial for a process on its own.

    Args:
        process_group: None where the process is alone.
    """

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        self._group = process_group
        self.rank = 0 if process_group is None else dist.get_rank(process_group)
        self.size = 1 if process_group is None else dist.get_world_size(process_group)

    def attempt(self, step: str, work: Callable[[], T]) -> T:
        """Do this rank's part of a step, and go on only if every rank could do its part.

        Raises:
            ShardferryError: this rank failed; its own error.
            RankError: another rank failed; names it and carries its message.
        """
        results: list[T] = []

        def keep() -> None:
            results.append(work())

        self.share(step, keep)
        return results[0]

    def share(self, step: str, work: Callable[[], T]) -> list[T]:
        """Like `attempt`, for results that are small: returns every rank's, by rank."""
        value: T | None = None
        error: Exception | None = None
        try:
            value = work()
        except Exception as caught:  # every failure must reach the others, or they wait for ever
            error = caught
        if self._group is None:
            if error is not None:
                raise error
            return [value]  # type: ignore[list-item]
        outcomes: list[Any] = [None] * self.size
        dist.all_gather_object(outcomes, (value, None if error is None else _words(error)), group=self._group)
        failures = {rank: message for rank, (_, message) in enumerate(outcomes) if message is not None}
        if failures:
            raise _error_for_all(step, failures, error)
        return [shared for shared, _ in outcomes]


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, ShardferryError) else f"{type(error).__name__}: {error}"


def _error_for_all(step: str, failures: dict[int, str], own: Exception | None) -> Exception:
    if isinstance(own, ShardferryError):
        return own
    by_message: dict[str, list[int]] = {}
    for rank, message in failures.items():
        by_message.setdefault(message, []).append(rank)
    parts = [f"rank {', '.join(map(str, ranks))}: {message}" for message, ranks in by_message.items()]
    error = RankError(f"{step} failed on {'; '.join(parts)}", sorted(failures))
    error.__cause__ = own
    return error
