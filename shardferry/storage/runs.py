"""Byte runs at regular distances: what a strided box of a tensor looks like to the file that holds it.

::

    rows of 6 elements, 4 wanted of 3 rows     |xxxx..|xxxx..|xxxx|    start 0, run_bytes 4, counts (3,), byte_strides (6,)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_LEAST_GAP = 4096  # bytes; a disk, a page cache and a network give no less


def in_vain(gap_bytes: int) -> int:
    """How much of a gap that is read over counts as over-read: none of one that costs nothing."""
    return gap_bytes if gap_bytes >= _LEAST_GAP else 0


@dataclass(frozen=True, slots=True)
class Runs:
    """Equally long runs of one file, ``counts[d]`` of them at a distance of ``byte_strides[d]`` in each dimension."""

    start: int  # bytes, of the first run
    run_bytes: int
    counts: tuple[int, ...]  # outermost first; none empty
    byte_strides: tuple[int, ...]  # descending

    @property
    def stop(self) -> int:
        """Where the last run ends, exclusive."""
        return (
            self.start + self.run_bytes + sum((n - 1) * s for n, s in zip(self.counts, self.byte_strides, strict=True))
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all runs."""
        return self.run_bytes * math.prod(self.counts)

    def ranges(self, *, max_gap_bytes: int, max_over_read: float) -> list[tuple[int, int]]:
        """Ranges (start and stop) that hold all runs, ascending.

        Args:
            max_gap_bytes: if there are more between two runs, these are in different ranges.
            max_over_read: bytes of a range between runs, over those of its runs; see `in_vain`.
        """
        outer, length = self._joined(max_gap_bytes, max_over_read)
        starts = np.array([self.start], dtype=np.int64)
        for count, stride in zip(self.counts[:outer], self.byte_strides[:outer], strict=True):
            starts = (starts[:, None] + np.arange(count, dtype=np.int64) * stride).ravel()
        return [(start, start + length) for start in starts.tolist()]

    def are_one_range(self, *, max_gap_bytes: int, max_over_read: float) -> bool:
        """Whether one range holds all of them; see `ranges`."""
        return self._joined(max_gap_bytes, max_over_read)[0] == 0

    def _joined(self, max_gap_bytes: int, max_over_read: float) -> tuple[int, int]:
        """How many outer dimensions are left when runs are joined from the inside, and how long the ranges are then."""
        outer, length = len(self.counts), self.run_bytes
        wanted, vain = self.run_bytes, 0
        while outer:
            count, gap = self.counts[outer - 1], self.byte_strides[outer - 1] - length
            wanted, vain = wanted * count, vain * count + (count - 1) * in_vain(gap)
            if count > 1 and (gap > max_gap_bytes or vain > max_over_read * wanted):
                break
            outer -= 1
            length += (count - 1) * self.byte_strides[outer]
        return outer, length
