"""Byte runs at regular distances: what a strided box of a tensor looks like to the file that holds it.

::

    rows of 6 elements, 4 wanted of 3 rows     |xxxx..|xxxx..|xxxx|    start 0, run_bytes 4, counts (3,), byte_strides (6,)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


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

    def ranges(self, *, max_gap_bytes: int) -> list[tuple[int, int]]:
        """Ranges (start and stop) that hold all runs, ascending; the bytes between two runs are in none if they are more
        than ``max_gap_bytes``."""
        length, outer = self.run_bytes, len(self.counts)
        while outer and self.byte_strides[outer - 1] - length <= max_gap_bytes:
            outer -= 1
            length += (self.counts[outer] - 1) * self.byte_strides[outer]
        starts = np.array([self.start], dtype=np.int64)
        for count, stride in zip(self.counts[:outer], self.byte_strides[:outer], strict=True):
            starts = (starts[:, None] + np.arange(count, dtype=np.int64) * stride).ravel()
        return [(start, start + length) for start in starts.tolist()]
