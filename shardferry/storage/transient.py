"""Tell a failure that another attempt may not meet from one that stays."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from shardferry.errors import StorageError


class TransientStorageError(StorageError):
    """One request failed in a way that another attempt may not: a timeout, a busy server, a connection that was cut.

    It never reaches whoever reads: `shardferry.storage.retry` tries again, and says in the end how often it did.
    """


_ERRNOS = frozenset(
    {
        errno.EAGAIN,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.EIO,
        errno.ENETDOWN,
        errno.ENETRESET,
        errno.ENETUNREACH,
        errno.EPIPE,
        errno.EREMOTEIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
    }
)
_CLIENT_STATUSES = frozenset({408, 425, 429})  # request timeout, too early, too many requests
_LASTING_SERVER_STATUSES = frozenset({501, 505})  # not implemented, version not supported
# Of HTTP clients that may not be installed, by name: a body or a connection that ended early.
_CUT = frozenset({"ClientPayloadError", "ClientConnectionError", "IncompleteRead", "RemoteProtocolError", "ReadError"})


def is_transient_status(status: int) -> bool:
    """Whether an HTTP status asks for another attempt."""
    return status in _CLIENT_STATUSES or (500 <= status < 600 and status not in _LASTING_SERVER_STATUSES)


def is_transient(error: BaseException) -> bool:
    """Whether another attempt may go well, by the error of any client, or what caused it."""
    for cause in _chain(error):
        if isinstance(cause, FileNotFoundError | PermissionError):
            return False
        status = _status(cause)
        if status is not None:
            return is_transient_status(status)
        if isinstance(cause, TimeoutError | ConnectionError) or _is_cut(cause):
            return True
        if isinstance(cause, OSError) and cause.errno in _ERRNOS:
            return True
    return False


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _is_cut(error: BaseException) -> bool:
    return any(base.__name__ in _CUT for base in type(error).__mro__)


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error carries: aiohttp's and azure's, gcsfs's, botocore's."""
    for name in ("status", "status_code", "code"):
        if (status := _as_status(getattr(error, name, None))) is not None:
            return status
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return _as_status(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
    return _as_status(getattr(response, "status_code", None))


def _as_status(value: object) -> int | None:
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    return value if isinstance(value, int) and 100 <= value < 600 else None
