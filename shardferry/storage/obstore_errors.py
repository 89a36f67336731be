"""Turn an error of obstore into one that says whether another attempt may help.

obstore has one class for nearly everything that a server answers, and tells the rest in its text. What is looked for in
that text is here and nowhere else; tests/core/storage/test_retrying.py provokes each of them from a real server.
"""

from __future__ import annotations

import re

from shardferry.errors import MissingFile, StorageError
from shardferry.storage.transient import TransientStorageError, is_transient_status

_STATUS = re.compile(r"status code: (\d{3})")
_PASSING = re.compile(r"kind: (Timeout|Connect|Interrupted|Request)\b")  # of `HttpError`, in the details
_OTHER_RANGE = re.compile(r"Requested \d+\.\.\d+, got (\d+)\.\.(\d+)")
_QUERY = re.compile(r"\?[^\s)]*")  # of a URL: may hold a signature
_NOT_FOUND, _RANGE_NOT_SATISFIABLE = 404, 416


def storage_error(error: Exception, what: str) -> StorageError:
    """The error to raise for one of obstore's, which says ``what`` went wrong (and where)."""
    from obstore.exceptions import NotSupportedError, PermissionDeniedError, UnauthenticatedError

    text, _, details = str(error).partition("\n")
    text = _QUERY.sub("?...", text)
    if isinstance(error, NotSupportedError):
        return StorageError(f"{what}: the storage doesn't serve ranges ({text})")
    if isinstance(error, PermissionDeniedError | UnauthenticatedError):
        return StorageError(f"{what}: access is refused; check the credentials (docs/storage.md): {text}")
    status = int(found[1]) if (found := _STATUS.search(text)) else None
    if status == _NOT_FOUND:  # of a bucket: obstore knows that of files only
        return MissingFile(f"{what}: {text}")
    if status == _RANGE_NOT_SATISFIABLE:
        return StorageError(f"{what}: the file ends before them; it is cut")
    if found := _OTHER_RANGE.search(text):
        return StorageError(f"{what}: bytes {found[1]} to {found[2]} came; the file is cut")
    passes = _PASSING.search(details) if status is None else is_transient_status(status)
    return (TransientStorageError if passes else StorageError)(f"{what}: {text}")
