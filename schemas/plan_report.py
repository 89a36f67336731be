"""What a load will cost, from the metadata alone: the JSON of ``shardferry plan --json``."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class RankPlan(BaseModel):
    """One rank's share, in bytes."""

    model_config = ConfigDict(frozen=True)

    rank: int
    bytes_needed: int
    bytes_read: int
    bytes_sent: int = 0
    bytes_received: int = 0
    num_requests: int
    arena_bytes: int


class Balance(BaseModel):
    """How much more than the mean the most loaded one has: 1.0 is even."""

    model_config = ConfigDict(frozen=True)

    bytes_needed: float  # of ranks
    bytes_read: float  # of ranks
    files: float  # needed bytes of the files that have any


class PlanReport(BaseModel):
    """All ranks' shares. What ranks need is exact; what they read is, too, unless `estimated`."""

    model_config = ConfigDict(frozen=True)

    location: str
    optimizer_key: str
    world_size: int
    mesh: dict[str, int]
    num_tensors: int
    unique_bytes_needed: int  # of the group: each byte that somebody needs, once
    storage_bytes_planned: int
    read_amplification: float  # storage_bytes_planned / unique_bytes_needed
    num_requests: int
    peak_memory_bytes: int  # of the busiest rank: its arena and its reads in flight
    strategy: Literal[
        "direct", "cooperative"
    ]  # where the spec says auto: direct if this machine has the files in memory
    ranks_planned: int  # the others read as one of these does
    estimated: bool  # some ranks' reads are taken, in proportion, from the plans of ranks that read otherwise
    balance: Balance
    lower_bound_s: float | None  # the needed bytes at the storage's bandwidth; None where that isn't given
    predicted_s: float | None  # the planned bytes at the same bandwidth, and the waits of the busiest rank's requests
    ranks: list[RankPlan]
