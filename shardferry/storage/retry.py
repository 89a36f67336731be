"""Turn a storage that sometimes fails into one that fails only for good: each request is tried again, alone, with back-off.

The waits grow exponentially and are drawn at random up to that ("full jitter"), so that the ranks of a job, which failed
together, don't come back together.
"""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from shardferry.config import ReadOptions
from shardferry.errors import StorageError
from shardferry.storage.base import Beginning, RangeReader
from shardferry.storage.traits import StorageTraits
from shardferry.storage.transient import TransientStorageError

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a request is tried, and how long."""

    max_attempts: int = ReadOptions().max_attempts  # `read.max_attempts`
    first_wait_s: float = 0.2  # at most; each later one at most twice the one before
    max_wait_s: float = 10.0
    max_elapsed_s: float = 120.0  # since the first attempt began; no attempt begins later

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts is {self.max_attempts}; a request is tried at least once")

    def longest_wait_s(self, attempt: int) -> float:
        """Before another attempt, after ``attempt`` of them failed."""
        # Past 64 doublings any first wait is longer than the longest; a float would overflow at 1024.
        return min(self.max_wait_s, self.first_wait_s * 2.0 ** min(attempt - 1, 64))


@dataclass(frozen=True, slots=True)
class Clock:
    """Time and chance. Tests have their own."""

    now_s: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    random: Callable[[], float] = random.random  # from 0 to 1


class RetryingReader:
    """Any storage, each of whose requests is tried up to ``policy.max_attempts`` times where it fails in passing.

    A missing file, a refusal and a short read don't pass, and are errors at once.
    """

    def __init__(self, storage: RangeReader, policy: RetryPolicy | None = None, clock: Clock | None = None) -> None:
        self.location = storage.location
        self._storage = storage
        self._policy = policy or RetryPolicy()
        self._clock = clock or Clock()

    @property
    def traits(self) -> StorageTraits:
        return self._storage.traits

    def listing(self) -> dict[str, int | None]:
        return self._try(self._storage.listing)

    def versions(self) -> dict[str, str]:
        return self._storage.versions()

    def expect(self, versions: Mapping[str, str]) -> None:
        self._storage.expect(versions)

    def size(self, path: str) -> int:
        return self._try(self._storage.size, path)

    def beginning(self, path: str, nbytes: int) -> Beginning | None:
        return self._try(self._storage.beginning, path, nbytes)

    def read_into(self, path: str, byte_offset: int, *buffers: memoryview) -> None:
        self._try(self._storage.read_into, path, byte_offset, *buffers)

    def mapped(self, path: str, start: int, stop: int) -> memoryview:
        return self._try(self._storage.mapped, path, start, stop)

    def is_in_memory(self, path: str, byte_offset: int) -> bool:
        return self._storage.is_in_memory(path, byte_offset)

    def close(self) -> None:
        self._storage.close()

    def _try(self, request: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        started_s = self._clock.now_s()
        for attempt in itertools.count(1):
            try:
                return request(*args, **kwargs)
            except TransientStorageError as error:
                wait_s = self._clock.random() * self._policy.longest_wait_s(attempt)
                elapsed_s = self._clock.now_s() - started_s
                if attempt >= self._policy.max_attempts or elapsed_s + wait_s > self._policy.max_elapsed_s:
                    raise StorageError(f"{error}; {self._tried(attempt, elapsed_s)}") from error
                logger.info("%s; trying again in %.2f s (attempt %d failed)", error, wait_s, attempt)
            self._clock.sleep(wait_s)
        raise AssertionError("unreachable")

    def _tried(self, attempts: int, elapsed_s: float) -> str:
        limit = (
            f"read.max_attempts is {self._policy.max_attempts}"
            if attempts >= self._policy.max_attempts
            else f"no attempt begins {self._policy.max_elapsed_s:g} s after the first, read.max_attempts is "
            f"{self._policy.max_attempts}"
        )
        return f"tried {attempts} time{'s' * (attempts != 1)} in {elapsed_s:.1f} s ({limit})"
