"""A progress bar for bytes, in a notebook's cell: HTML that replaces itself. It needs no extension of the notebook."""

from __future__ import annotations

from html import escape
from typing import Any

from IPython.display import display

from shardferry.pipeline.display import Meter


class NotebookBar:
    """One bar with bytes, rate, time left and the slowest rank. What it showed last stays in the notebook's file."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._meter = Meter()
        self._shown: Any = None  # the handle of the cell's output

    def show(self, done: int, total: int, note: str = "") -> None:
        """As `shardferry.pipeline.display.ByteProgress` says."""
        words = f"{self._title}: {self._meter.words(done, total, note)}"
        value = f' value="{done / total:.4f}"' if total else ""  # without a value the bar pulses
        html = f'<progress{value} style="width: 20em; vertical-align: middle"></progress> {escape(words)}'
        content = {"text/html": html, "text/plain": words}
        if self._shown is None:
            self._shown = display(content, raw=True, display_id=True)
        else:
            self._shown.update(content, raw=True)
