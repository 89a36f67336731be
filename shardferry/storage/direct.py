"""Read local files past the page cache: aligned reads into a bounce buffer, from which the wanted bytes are copied.

Worth it where a checkpoint is read once, from a disk or a parallel file system that is faster than the page cache's
book-keeping, or where the memory is wanted for something else.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from shardferry.storage.base import spread

logger = logging.getLogger(__name__)

ALIGNMENT = 4096  # bytes, of positions, lengths and memory: a multiple of what any disk asks for
BOUNCE_BYTES = 4 * 1024 * 1024
_REFUSALS = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY})

_own = threading.local()  # one bounce buffer a thread


def open_direct(path: Path) -> int | None:
    """A descriptor for direct I/O; None where the file system refuses it, as some tell only when they are read.

    Raises OSError where the file can't be opened at all.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags | os.O_DIRECT)
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        _log_refusal(path, error)
        return None
    try:
        os.preadv(descriptor, [_bounce()[:ALIGNMENT]], 0)
    except OSError as error:
        os.close(descriptor)
        if error.errno not in _REFUSALS:
            raise
        _log_refusal(path, error)
        return None
    return descriptor


def pread_direct(descriptor: int, buffers: Sequence[memoryview], byte_offset: int) -> int:
    """Fill the buffers from the first on; how many bytes. None are left in the file where it is 0."""
    start = byte_offset - byte_offset % ALIGNMENT
    skipped = byte_offset - start
    wanted = sum(map(len, buffers))
    length = min(BOUNCE_BYTES, -(-(skipped + wanted) // ALIGNMENT) * ALIGNMENT)
    bounce = _bounce()
    found = os.preadv(descriptor, [bounce[:length]], start)
    count = min(found - skipped, wanted)
    if count <= 0:
        return 0
    spread(bounce[skipped : skipped + count], buffers)
    return count


def _bounce() -> memoryview:
    found: memoryview | None = getattr(_own, "bounce", None)
    if found is None:
        found = _own.bounce = memoryview(mmap.mmap(-1, BOUNCE_BYTES))  # memory of whole pages is aligned
    return found


def _log_refusal(path: Path, error: OSError) -> None:
    logger.info("%s: no direct I/O on this file system (%s); reading through the page cache", path, error.strerror)
