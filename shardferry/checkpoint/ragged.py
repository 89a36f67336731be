"""Turn rows of several integers each, of whatever lengths, into flat columns, and take rows out of these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np


@dataclass(frozen=True)
class Ragged:
    """Rows of integers: row ``i`` is ``flat[starts[i] : starts[i] + lengths[i]]``.

    ::

        rows     (0, 4) () (7)
        flat     0 4 7
        lengths  2 0 1
        starts   0 2 2
    """

    flat: np.ndarray  # int64
    lengths: np.ndarray  # int64[num_rows]

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> Ragged:
        """Raises TypeError, ValueError, OverflowError: what is no row of integers of 64 bits."""
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        return cls(np.fromiter(chain.from_iterable(rows), np.int64, int(lengths.sum())), lengths)

    @classmethod
    def joined(cls, parts: Sequence[Ragged]) -> Ragged:
        """The rows of all parts, one part after another."""
        return cls(np.concatenate([p.flat for p in parts]), np.concatenate([p.lengths for p in parts]))

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def starts(self) -> np.ndarray:
        """First entry of each row."""
        starts: np.ndarray = np.cumsum(self.lengths) - self.lengths
        return starts

    def row(self, index: int) -> tuple[int, ...]:
        """One row, in Python's integers."""
        start = int(self.starts[index])
        return tuple(self.flat[start : start + int(self.lengths[index])].tolist())

    def take(self, rows: np.ndarray) -> Ragged:
        """Some rows, in the order asked for; each as often as asked for."""
        lengths = self.lengths[rows]
        shifts = np.repeat(self.starts[rows] - (np.cumsum(lengths) - lengths), lengths)
        return Ragged(self.flat[np.arange(len(shifts)) + shifts], lengths)

    def sums(self) -> np.ndarray:
        """The sum of each row, ``int64[num_rows]``."""
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.flat)])
        sums: np.ndarray = before[self.starts + self.lengths] - before[self.starts]
        return sums

    def any_of(self, marks: np.ndarray) -> np.ndarray:
        """For each row, whether one of its entries is marked: of ``bool[num_entries]``, ``bool[num_rows]``."""
        marked: np.ndarray = Ragged(marks.astype(np.int64), self.lengths).sums() > 0
        return marked
