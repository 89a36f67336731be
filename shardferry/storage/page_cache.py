"""Ask the kernel whether a byte of a file is in its page cache."""

from __future__ import annotations

import os


def is_cached(descriptor: int, byte_offset: int) -> bool:
    """Whether a byte can be had without asking the disk. Where it can't, the kernel may begin to fetch its page."""
    # Else the kernel would begin to read ahead from here, and from each other place that is asked for.
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    try:
        return os.preadv(descriptor, [bytearray(1)], byte_offset, os.RWF_NOWAIT) == 1
    except OSError:  # not in the page cache, or a file system that can't tell
        return False
    finally:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_NORMAL)
