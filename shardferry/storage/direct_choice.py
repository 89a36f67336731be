"""Decide whether a storage's files are read past the page cache or through it: given, or found out by a short probe.

::

    the first file that is long enough     |..x....x....x....x..|    places of 1 MiB that are not in memory
                                              d    c    d    c       are read past the page cache, and through it
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shardferry.storage.direct import open_direct, pread_direct
from shardferry.storage.page_cache import is_cached

logger = logging.getLogger(__name__)

DirectIO = bool | Literal["auto"]
PIECE_BYTES = 1024 * 1024
MIN_FILE_BYTES = 64 * PIECE_BYTES  # of a shorter file the probe would be a good part
_NUM_PAIRS = 3  # of pieces; in vain are at most all of them, 6 MiB
_ENOUGH_S = 0.05  # after which no other pair is begun
_NUM_SAMPLES = 16  # places that are asked whether they are in memory
_CLEARLY = 1.5  # times as quick; less the page cache may make up for by reading ahead, which the probe leaves out

Read = Callable[[memoryview, int], int]  # fills a buffer from a byte offset on; how many bytes


@dataclass(frozen=True, slots=True)
class Rates:
    """What a disk gives, in bytes a second."""

    direct: float  # past the page cache
    cached: float  # through the page cache, which had none of it

    @property
    def favour_direct(self) -> bool:
        """Whether direct I/O is clearly quicker. Where in doubt the page cache is better: it gives to others what one has read."""
        return self.direct > _CLEARLY * self.cached

    def __str__(self) -> str:
        return f"direct I/O gives {self.direct / 1e6:.0f} MB/s, the page cache {self.cached / 1e6:.0f} MB/s"


class DirectChoice:
    """Whether files are read past the page cache; with ``"auto"`` found out once, for all of them. Safe to use from several threads."""

    def __init__(self, direct_io: DirectIO) -> None:
        self.is_direct: bool | None = direct_io if isinstance(direct_io, bool) else None  # None: not known yet
        self._lock = threading.Lock()

    def decide(self, path: Path, descriptor: int) -> None:
        """Find out, with a file that is about to be read, unless it is too short to tell.

        Args:
            descriptor: of the file, through the page cache.
        """
        with self._lock:  # who comes meanwhile would be measured too
            if self.is_direct is None and os.fstat(descriptor).st_size >= MIN_FILE_BYTES:
                self.is_direct = _is_direct_better(path, descriptor)


def _is_direct_better(path: Path, descriptor: int) -> bool:
    is_direct, reason = _verdict(path, descriptor)
    logger.info("%s: %s; reading %s the page cache", path, reason, "past" if is_direct else "through")
    return is_direct


def _verdict(path: Path, descriptor: int) -> tuple[bool, str]:
    """Whether direct I/O is better, and why in words."""
    places = _uncached_places(descriptor)
    if len(places) <= _NUM_SAMPLES // 2:
        return False, f"{_NUM_SAMPLES - len(places)} of {_NUM_SAMPLES} places are in memory"
    try:
        rates = _measured(path, descriptor, places)
    except OSError as error:  # it will come again where it matters
        return False, f"the probe failed ({error})"
    if rates is None:
        return False, "the file system refuses direct I/O"
    return rates.favour_direct, str(rates)


def _uncached_places(descriptor: int) -> list[int]:
    """Byte offsets of some pieces that are not in memory, anywhere in the file: other processes look at other ones."""
    num_pieces = os.fstat(descriptor).st_size // PIECE_BYTES
    places = [piece * PIECE_BYTES for piece in random.sample(range(num_pieces), _NUM_SAMPLES)]
    # Asked of its last page: asking may fetch that, and the rest of the piece is one request all the same.
    return [place for place in places if not is_cached(descriptor, place + PIECE_BYTES - 1)]


def _measured(path: Path, descriptor: int, places: list[int]) -> Rates | None:
    """Read some places each way. None where the file system refuses direct I/O. Raises OSError."""
    direct = open_direct(path)
    if direct is None:
        return None
    # Nothing is read ahead of what is asked for: that may be many MiB, and would be under way when the other way is measured.
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    try:
        return _compare(
            lambda buffer, place: pread_direct(direct, [buffer], place),
            lambda buffer, place: os.preadv(descriptor, [buffer], place),
            places,
        )
    finally:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_NORMAL)
        os.close(direct)


def _compare(direct: Read, cached: Read, places: list[int]) -> Rates:
    """The better of some rates each way."""
    buffer = memoryview(bytearray(PIECE_BYTES))
    rates = Rates(0.0, 0.0)
    started_s = time.perf_counter()
    for pair in range(_NUM_PAIRS):
        if time.perf_counter() - started_s > _ENOUGH_S:
            break
        rates = Rates(
            max(rates.direct, _rate(direct, buffer, places[2 * pair])),
            max(rates.cached, _rate(cached, buffer, places[2 * pair + 1])),
        )
    return rates


def _rate(read: Read, buffer: memoryview, place: int) -> float:
    started_s = time.perf_counter()
    nbytes = read(buffer, place)
    return nbytes / max(time.perf_counter() - started_s, 1e-9)
