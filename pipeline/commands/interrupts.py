"""Ctrl-C, remembered."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupts:
    """Whether Ctrl-C was pressed.

    Python drops the exception of Ctrl-C where it falls into a destructor or a callback, of which Ray and torch have many: the
    command would go on. So long work asks from time to time.
    """

    def __init__(self) -> None:
        self._has_come = False

    @contextmanager
    def noticed(self) -> Iterator[None]:
        """Within the ``with``, Ctrl-C raises KeyboardInterrupt, here and in the next call of `check`."""
        if threading.current_thread() is not threading.main_thread():  # which alone gets signals
            yield
            return
        before = signal.signal(signal.SIGINT, self._interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def check(self) -> None:
        """Raise KeyboardInterrupt if Ctrl-C was pressed."""
        if self._has_come:
            raise KeyboardInterrupt

    def _interrupt(self, *_: object) -> None:
        self._has_come = True
        raise KeyboardInterrupt
