"""Let the ranks of a process group agree on each step: all go on, or all raise."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
import torch.distributed as dist

from shardferry.errors import RankError, ShardferryError, SpecError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Balance(Generic[T]):
    """What the results of all ranks must have in common: the numbers of them add up to zero."""

    number: Callable[[T], int]  # of a rank's result
    message: str  # of the SpecError that all ranks raise where they don't


class Agreement:
    """Collective steps of the ranks of a process group; trivial for a process on its own.

    Args:
        process_group: None where the process is alone.
    """

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        self._group = process_group
        self.rank = 0 if process_group is None else dist.get_rank(process_group)
        self.size = 1 if process_group is None else dist.get_world_size(process_group)

    @property
    def host_group(self) -> dist.ProcessGroup | None:
        """The process group if it carries host memory between ranks; None for a single process, and for NCCL alone."""
        group = self._group
        return group if group is not None and _collective_device(group).type == "cpu" else None

    def all_or_raise(self, step: str, work: Callable[[], T], balance: Balance[T] | None = None) -> T:
        """Do this rank's part of a step, and return only if every rank did its part.

        Args:
            balance: of the ranks' results: they must fit each other.

        Raises:
            ShardferryError: this rank failed; its own error.
            SpecError: the results don't fit.
            RankError: another rank failed; names it and carries its message.
        """
        value, error = _attempt(work)
        if self._group is not None:
            # Two numbers per rank: a tenth of the cost of gathering objects. Messages are gathered only after a failure.
            own = 0 if error is not None or balance is None else balance.number(cast(T, value))
            figures = [int(error is not None), (own + 2**63) % 2**64 - 2**63]  # sums wrap around, as those of int64 do
            total = torch.tensor(figures, dtype=torch.int64, device=_collective_device(self._group))
            dist.all_reduce(total, group=self._group)
            num_failed, left = total.tolist()
            if num_failed:
                _raise_failures(step, self._gather(_Outcome.of(None, error)), error)
            if left and balance is not None:
                raise SpecError(balance.message)
        if error is not None:
            raise error
        return cast(T, value)

    def same(self, of: Callable[[T], object], message: str) -> Balance[T]:
        """The balance of results that must be the same on all ranks in some respect, as ``repr`` writes it."""
        weight = self.size - 1 if self.rank == 0 else -1
        return Balance(lambda value: weight * zlib.crc32(repr(of(value)).encode()), message)

    def gather(self, step: str, work: Callable[[], T]) -> list[T]:
        """Like `all_or_raise`, and returns every rank's result, by rank; results should be small."""
        value, error = _attempt(work)
        outcomes = self._gather(_Outcome.of(value, error))
        _raise_failures(step, outcomes, error)
        return [cast(T, outcome.value) for outcome in outcomes]

    def from_rank0(self, step: str, work: Callable[[], T], *, same: type[ShardferryError] | tuple[()] = ()) -> T:
        """Like `all_or_raise`, for a step that rank 0 does for all: every rank gets its result.

        Args:
            same: an error of this class is raised on all ranks as it is.
        """
        value, error = _attempt(work) if self.rank == 0 else (None, None)
        outcome = _Outcome(error, None) if isinstance(error, same) else _Outcome.of(value, error)
        if self._group is not None:
            outcomes = [outcome]
            dist.broadcast_object_list(outcomes, group=self._group, group_src=0)
            (outcome,) = outcomes
        if isinstance(outcome.value, same):
            raise outcome.value
        _raise_failures(step, [outcome], error)
        return cast(T, outcome.value)

    def _gather(self, value: T) -> list[T]:
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values


@dataclass(frozen=True, slots=True)
class _Outcome:
    """A rank's result, or its failure."""

    value: Any
    failure: str | None

    @classmethod
    def of(cls, value: Any, error: Exception | None) -> _Outcome:
        if error is None or isinstance(error, ShardferryError):
            return cls(value, None if error is None else str(error))
        return cls(value, f"{type(error).__name__}: {error}")


def _raise_failures(step: str, outcomes: Sequence[_Outcome], own: Exception | None) -> None:
    """Raise this rank's own error, or one that names the ranks that failed; nothing if none did."""
    by_message: dict[str, list[int]] = {}
    for rank, outcome in enumerate(outcomes):
        if outcome.failure is not None:
            by_message.setdefault(outcome.failure, []).append(rank)
    if isinstance(own, ShardferryError):
        raise own
    if by_message:
        parts = [f"rank {', '.join(map(str, ranks))}: {message}" for message, ranks in by_message.items()]
        failed = sorted(rank for ranks in by_message.values() for rank in ranks)
        raise RankError(f"{step} failed on {'; '.join(parts)}", failed) from own


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:  # every failure must reach the others, or they wait forever
        return None, error


def _collective_device(group: dist.ProcessGroup | None) -> torch.device:
    """Where a group's collectives expect tensors: on the host if the group has a backend for it."""
    if "cpu:" in dist.get_backend_config(group):
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return accelerator
