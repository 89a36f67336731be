"""Let the ranks of a process group agree before each goes on: all go on, or all raise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from shardferry._gc import paused_gc
from shardferry.errors import RankError, ShardferryError
from shardferry.exchange.messages import broadcast_object, gather_objects

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

    @property
    def host_group(self) -> dist.ProcessGroup | None:
        """The process group where it carries host memory between ranks; None for a process on its own, and for NCCL alone."""
        group = self._group
        return group if group is not None and _collective_device(group).type == "cpu" else None

    def attempt(self, step: str, work: Callable[[], T]) -> T:
        """Do this rank's part of a step, and go on only if every rank could do its part.

        Raises:
            ShardferryError: this rank failed; its own error.
            RankError: another rank failed; names it and carries its message.
        """
        value, error = _outcome(work)
        if self._group is not None and self._somebody_failed(error is not None):
            _raise_failures(step, self._gather(_Answer(None, None if error is None else _words(error))), error)
        if error is not None:
            raise error
        return cast(T, value)

    def share(self, step: str, work: Callable[[], T]) -> list[T]:
        """Like `attempt`, for results that are small: returns every rank's, by rank."""
        value, error = _outcome(work)
        answers = self._gather(_Answer(value, None if error is None else _words(error)))
        _raise_failures(step, answers, error)
        return [cast(T, answer.value) for answer in answers]

    def from_first(self, step: str, work: Callable[[], T]) -> T:
        """Like `attempt`, for what one rank does for all: rank 0 works, and every rank gets its result."""
        value, error = _outcome(work) if self.rank == 0 else (None, None)
        answer = _Answer(value, None if error is None else _words(error))
        if self._group is not None:
            with paused_gc():
                answer = broadcast_object(answer, self._group, _collective_device(self._group))
        _raise_failures(step, [answer], error)
        return cast(T, answer.value)

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """For each place, whether some rank has it set. All ranks give as many."""
        if self._group is None or not flags:
            return list(flags)
        joined = torch.tensor(flags, dtype=torch.uint8, device=_collective_device(self._group))
        dist.all_reduce(joined, op=dist.ReduceOp.MAX, group=self._group)
        return [bool(flag) for flag in joined.tolist()]

    def _somebody_failed(self, failed: bool) -> bool:
        """One number each, which costs a tenth of a gather of objects; words travel only where there are any."""
        flag = torch.tensor([int(failed)], dtype=torch.int32, device=_collective_device(self._group))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag.item())

    def _gather(self, value: T) -> list[T]:
        if self._group is None:
            return [value]
        with paused_gc():
            return gather_objects(value, self._group, _collective_device(self._group))


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a rank made, or why it could not."""

    value: Any
    failure: str | None


def _raise_failures(step: str, answers: Sequence[_Answer], own: Exception | None) -> None:
    failures = {rank: answer.failure for rank, answer in enumerate(answers) if answer.failure is not None}
    if failures:
        raise _error_for_all(step, failures, own)


def _outcome(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:  # every failure must reach the others, or they wait for ever
        return None, error


def _collective_device(group: dist.ProcessGroup | None) -> torch.device:
    """Where a group's collectives want their tensors: on the host where it has a backend for it."""
    if "cpu:" in dist.get_backend_config(group):
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return accelerator


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
