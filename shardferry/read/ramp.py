"""Decide how many reads are under way at once: twice as many as long as that brings more bytes a second."""

from __future__ import annotations

_GROWTH = 1.2  # how much more a doubled limit must bring, to be worth its threads
_LEAST_STEP_S = 0.005  # shorter ones say nothing
_LEAST_READS = 3  # of a step, alike: the first read of a file is slower than those that the kernel has read ahead


class Ramp:
    """Grows a limit from ``first`` to at most ``most``. Whoever reads says what was done, and when.

    A step lasts until as many reads have ended as may be under way, or a multiple of that; the first after a change isn't judged, as its reads
    were begun under another limit. A limit that brings no more is taken back::

        limit    4    8    8    16   16   32   32   16        a store that gives 400 MB/s in all
        MB/s     100       200       400       405
    """

    def __init__(self, *, first: int, most: int) -> None:
        self.limit = min(first, most)
        self._most = most
        self._proven = self.limit  # the limit that brought the best speed
        self._best: float | None = None  # a second; None: not known yet
        self._is_new = False  # this limit: its first step isn't over
        self._is_settled = self.limit == most
        self._ended = 0  # reads, in this step
        self._amount = 0  # done in this step
        self._since_s = 0.0

    def begin(self, now_s: float) -> None:
        """Work begins that can't be compared with what was before. The limit stays."""
        self._best, self._is_new, self._proven = None, False, self.limit
        self._is_settled = self.limit == self._most
        self._next_step(now_s)

    def done(self, amount: int, now_s: float) -> None:
        """A read has ended.

        Args:
            amount: bytes, or whatever else of which more a second is better.
        """
        self._ended += 1
        self._amount += amount
        elapsed_s = now_s - self._since_s
        # Whole rounds: reads that begin together end together.
        if self._is_settled or self._ended % self.limit or self._ended < _LEAST_READS or elapsed_s < _LEAST_STEP_S:
            return
        self._judge(self._amount / elapsed_s)
        self._next_step(now_s)

    def _judge(self, speed: float) -> None:
        if self._is_new:
            self._is_new = False
        elif self._best is None or speed >= _GROWTH * self._best:
            self._best, self._proven, self._is_new = speed, self.limit, True
            self.limit = min(2 * self.limit, self._most)
            self._is_settled = self.limit == self._proven
        else:
            self.limit, self._is_settled = self._proven, True

    def _next_step(self, now_s: float) -> None:
        self._ended = self._amount = 0
        self._since_s = now_s
