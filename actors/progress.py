"""Progress of a load: loaders report it, and the command line shows it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of one rank, in bytes, and the phase that it is in."""

    bytes_done: int
    bytes_total: int  # 0 until the rank has planned
    phase: str = ""  # of its load; empty: it doesn't load yet
