"""A progress bar for bytes, on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


class ByteBar:
    """One bar with bytes, rate and time left."""

    def __init__(self, progress: Progress, title: str) -> None:
        self._progress = progress
        self._task = progress.add_task(title, total=None, start=False)
        self._is_started = False

    def show(self, done: int, total: int, note: str = "") -> None:
        """Move the bar to ``done`` of ``total`` bytes. While ``total`` is 0, the bar pulses.

        Rate and time left count from the first bytes: the actors' start doesn't count.
        """
        if done and not self._is_started:
            self._progress.start_task(self._task)
            self._is_started = True
        self._progress.update(self._task, completed=done, total=total or None)


@contextmanager
def byte_bar(title: str) -> Iterator[ByteBar]:
    """Show a bar on stderr for the time of the context."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield ByteBar(progress, title)
