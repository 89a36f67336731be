"""Try requests again that failed with a transient error, each on its own, with exponential back-off.

Each wait is drawn at random between zero and a limit that doubles ("full jitter"), so that the ranks of a job, whose requests
failed together, do not come back together.
"""

from __future__ import annotations

import errno
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

from shardferry.config import ReadOptions
from shardferry.errors import StorageError
from shardferry.storage.base import RangeReader

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class TransientStorageError(StorageError):
    """One request failed in a way that another attempt may not: a timeout, a busy server, a connection that was cut.

    `RetryingReader` catches it: callers of a storage that `open_storage` made never see it.
    """


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a request is tried, and how long."""

    max_attempts: int = ReadOptions().max_attempts  # `read.max_attempts`
    first_wait_s: float = 0.2  # limit of the first wait; the limit of each later wait is twice the one before
    max_wait_s: float = 10.0  # limit of any wait
    max_elapsed_s: float = 120.0  # from the start of the first attempt to the start of the last one
    on_retry: Callable[[], None] = field(default=lambda: None, compare=False)  # called before each further attempt

    def longest_wait_s(self, attempt: int) -> float:
        """Limit of the wait after ``attempt`` failed attempts."""
        # After 64 doublings the limit of any first wait exceeds max_wait_s; 2.0**1024 would overflow.
        return min(self.max_wait_s, self.first_wait_s * 2.0 ** min(attempt - 1, 64))


@dataclass(frozen=True, slots=True)
class Clock:
    """Time and chance. Tests have their own."""

    now_s: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    random: Callable[[], float] = random.random  # uniform in [0, 1)


class RetryingReader(RangeReader):
    """A storage whose requests are tried up to ``policy.max_attempts`` times where they raise TransientStorageError.

    All other errors (a missing file, a refusal, a short read) are raised at once.

    Args:
        storage: makes the requests.
        policy: default: `RetryPolicy`'s own numbers.
        clock: default: the real one.
        options: as for `RangeReader`.
    """

    def __init__(
        self,
        storage: RangeReader,
        policy: RetryPolicy | None = None,
        clock: Clock | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(storage.location, storage.traits, options)
        self._storage = storage
        self._policy = policy or RetryPolicy()
        self._clock = clock or Clock()

    def listing(self) -> dict[str, int | None]:
        return self._try(self._storage.listing)

    def versions(self) -> dict[str, str]:
        return self._storage.versions()

    def times(self) -> dict[str, float]:
        return self._storage.times()

    def expect(self, versions: Mapping[str, str]) -> None:
        self._storage.expect(versions)

    def lacking(self, paths: Iterable[str]) -> list[str]:
        return self._storage.lacking(paths)

    def size(self, path: str) -> int:
        return self._try(self._storage.size, path)

    def read_into(self, path: str, byte_offset: int, *buffers: memoryview) -> None:
        self._try(self._storage.read_into, path, byte_offset, *buffers)

    def mapped(self, path: str, start: int, stop: int) -> memoryview:
        return self._try(self._storage.mapped, path, start, stop)

    def close(self) -> None:
        self._storage.close()

    def _try(self, request: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        started_s, attempt = self._clock.now_s(), 1
        while True:
            try:
                return request(*args, **kwargs)
            except TransientStorageError as error:
                wait_s = self._clock.random() * self._policy.longest_wait_s(attempt)
                elapsed_s = self._clock.now_s() - started_s
                if attempt >= self._policy.max_attempts or elapsed_s + wait_s > self._policy.max_elapsed_s:
                    raise StorageError(f"{error}; {self._tried(attempt, elapsed_s)}") from error
                logger.info("%s; trying again in %.2f s (attempt %d failed)", error, wait_s, attempt)
            self._clock.sleep(wait_s)
            self._policy.on_retry()
            attempt += 1

    def _tried(self, attempts: int, elapsed_s: float) -> str:
        limit = f"read.max_attempts is {self._policy.max_attempts}"
        if attempts < self._policy.max_attempts:
            limit = f"no attempt begins {self._policy.max_elapsed_s:g} s after the first, {limit}"
        return f"tried {attempts} time{'s' * (attempts != 1)} in {elapsed_s:.1f} s ({limit})"


# Without those for which Python raises TimeoutError or a ConnectionError.
_TRANSIENT_ERRNOS = frozenset(
    {
        errno.EAGAIN,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.EIO,
        errno.ENETDOWN,
        errno.ENETRESET,
        errno.ENETUNREACH,
        errno.EREMOTEIO,
        errno.ESTALE,
    }
)
_TRANSIENT_CLIENT_STATUSES = frozenset({408, 425, 429})  # request timeout, too early, too many requests
_LASTING_SERVER_STATUSES = frozenset({501, 505})  # not implemented, version not supported
# Errors of HTTP clients that may not be installed, by class name: the body or the connection ended early.
_CUT_CONNECTIONS = frozenset(
    {"ClientPayloadError", "ClientConnectionError", "IncompleteRead", "RemoteProtocolError", "ReadError"}
)


def is_transient_status(status: int) -> bool:
    """Whether a request that was answered with this HTTP status is worth another attempt."""
    return status in _TRANSIENT_CLIENT_STATUSES or (500 <= status < 600 and status not in _LASTING_SERVER_STATUSES)


def is_transient(error: BaseException) -> bool:
    """Whether a request that raised this error is worth another attempt.

    Args:
        error: of any client. Its causes are looked at too; the first one that tells decides.
    """
    for cause in _chain(error):
        if isinstance(cause, FileNotFoundError | PermissionError):
            return False
        status = _http_status(cause)
        if status is not None:
            return is_transient_status(status)
        if isinstance(cause, TimeoutError | ConnectionError):
            return True
        if any(base.__name__ in _CUT_CONNECTIONS for base in type(cause).__mro__):
            return True
        if isinstance(cause, OSError) and cause.errno in _TRANSIENT_ERRNOS:
            return True
    return False


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _http_status(error: BaseException) -> int | None:
    for value in _possible_statuses(error):
        status = int(value) if isinstance(value, str) and value.isdecimal() else value
        if isinstance(status, int) and 100 <= status < 600:
            return status
    return None


def _possible_statuses(error: BaseException) -> Iterator[object]:
    """What stands where aiohttp, azure, gcsfs and botocore store the HTTP status of an error."""
    for name in ("status", "status_code", "code"):
        yield getattr(error, name, None)
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        yield response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    yield getattr(response, "status_code", None)


def storage_error(what: str, error: Exception) -> StorageError:
    """The error for a request that failed: one that says whether another attempt may succeed."""
    return (TransientStorageError if is_transient(error) else StorageError)(f"{what}: {error_text(error)}")


def error_text(error: Exception) -> str:
    """The class of an error, and what it says."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
