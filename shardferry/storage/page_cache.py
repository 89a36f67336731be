"""Ask the kernel whether bytes of a file are in its page cache, without fetching any."""

from __future__ import annotations

import ctypes
import os
from functools import cache

_CACHESTAT = 451  # the system call's number on x86-64 and ARM; Linux 6.5


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Pages(ctypes.Structure):
    """What of a range is where, in pages."""

    _fields_ = tuple(
        (name, ctypes.c_uint64) for name in ("cached", "dirty", "in_writeback", "evicted", "recently_evicted")
    )


def is_cached(descriptor: int, byte_offset: int) -> bool:
    """Whether a byte can be had without asking the disk."""
    found = cached_pages(descriptor, byte_offset, 1)
    return _answers_at_once(descriptor, byte_offset) if found is None else found > 0


def cached_pages(descriptor: int, byte_offset: int, nbytes: int) -> int | None:
    """How many pages of a range the page cache has. None: the kernel doesn't tell, or not of this file."""
    asked, found = _Range(byte_offset, nbytes), _Pages()
    if _libc().syscall(_CACHESTAT, descriptor, ctypes.byref(asked), ctypes.byref(found), 0):
        return None
    return int(found.cached)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _answers_at_once(descriptor: int, byte_offset: int) -> bool:
    """Where the kernel is older, or doesn't say it of a file of somebody else. Where the byte is not in the page cache, the kernel may begin to fetch its page."""
    # Else the kernel would begin to read ahead from here, and from each other place that is asked for.
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    try:
        return os.preadv(descriptor, [bytearray(1)], byte_offset, os.RWF_NOWAIT) == 1
    except OSError:  # not in the page cache, or a file system that can't tell
        return False
    finally:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_NORMAL)
