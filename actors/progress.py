"""How far a load is: what loaders tell and people are shown."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one rank is, in bytes; ``bytes_total`` is 0 until the rank has planned."""

    bytes_done: int
    bytes_total: int
