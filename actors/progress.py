"""Progress of a load: loaders report it, and the command line shows it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of one rank, in bytes."""

    bytes_done: int
    bytes_total: int  # 0 until the rank has planned
