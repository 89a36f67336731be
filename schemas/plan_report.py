"""The dry run of a load, from the metadata alone: the JSON of ``shardferry plan --json``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict


class RankPlan(BaseModel):
    """The part of one rank, in bytes."""

    model_config = ConfigDict(frozen=True)

    rank: int
    bytes_needed: int
    bytes_read: int
    bytes_sent: int = 0
    bytes_received: int = 0
    num_requests: int
    arena_bytes: int


def max_over_mean(counts: Sequence[int]) -> float:
    """The balance of a load: 1.0 is even."""
    total = sum(counts)
    return max(counts) * len(counts) / total if total else 1.0


class Balance(BaseModel):
    """Balance of the load: the maximum over the mean; 1.0 is even."""

    model_config = ConfigDict(frozen=True)

    bytes_needed: float  # over all ranks
    bytes_read: float  # over all ranks
    files: float  # needed bytes, over the files that have any


class PlanReport(BaseModel):
    """The parts of all ranks. The needed bytes are exact; the read bytes are exact unless `estimated`."""

    model_config = ConfigDict(frozen=True)

    location: str
    model_location: str | None = None  # of the weights, where that is another checkpoint
    optimizer_key: str | None
    world_size: int
    mesh: dict[str, int]
    num_tensors: int
    unique_bytes_needed: int  # bytes that at least one rank needs, each counted once
    storage_bytes_planned: int
    read_amplification: float  # storage_bytes_planned / unique_bytes_needed
    num_requests: int
    peak_memory_bytes: int  # largest arena, and the buffers of the reads in flight
    strategy: Literal["direct", "cooperative"]  # a spec's auto: direct if the checkpoint is in local files
    strategy_reason: str
    ranks_planned: int  # the numbers of other ranks are taken from these
    estimated: bool  # some ranks' reads are scaled from those of ranks with other boxes
    balance: Balance
    lower_bound_s: float | None  # unique_bytes_needed over the storage's bandwidth; None if it isn't given
    predicted_s: float | None  # storage_bytes_planned over it, plus the latencies of the rank with most requests
    warnings: list[str] = []
    saved_as: dict[str, int] = {}  # how the checkpoint's tensors were sharded, in words: number of tensors
    file_bytes: dict[str, int] = {}  # needed bytes of tensors, each counted once, by file
    versions: dict[str, str] = {}  # by program
    command: str = ""  # that made the report
    finished: str = ""  # date and time, ISO 8601, UTC
    ranks: list[RankPlan]
