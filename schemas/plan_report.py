"""What a load will cost, from the metadata alone: the JSON of ``shardferry plan --json``."""

from __future__ import annotations

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


class PlanReport(BaseModel):
    """All ranks' shares."""

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
    lower_bound_s: float | None  # None where read.storage_bandwidth isn't set
    ranks: list[RankPlan]
