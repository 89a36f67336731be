"""What a load did: the JSON of ``shardferry run --report``."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Span(BaseModel):
    """One phase of one rank, in seconds since the epoch."""

    model_config = ConfigDict(frozen=True)

    name: str
    start: float
    end: float


class RankReport(BaseModel):
    """One rank's load."""

    model_config = ConfigDict(frozen=True)

    rank: int
    node: str
    device: str
    gpu_ids: list[str]
    bytes_needed: int
    bytes_read: int
    bytes_sent: int = 0
    bytes_received: int = 0
    num_requests: int
    arena_bytes: int
    peak_rss_bytes: int
    transport: str
    strategy: str
    strategy_reason: str
    host_copy_bandwidth: float  # bytes a second, measured after the load; for the lower bound
    device_copy_bandwidth: float | None = None  # the same to the GPU; None where the arena is on the host
    bytes_forwarded: int = 0  # to ranks that share no memory with this one
    missing: list[str] = []  # FQNs that the rank wants and the checkpoint hasn't, where that is allowed
    unexpected: list[str] = []  # FQNs that the checkpoint has and no rank wants, where that is allowed
    phases: dict[str, float]  # seconds, one after the other
    busy: dict[str, float] = {}  # seconds of the phase "read" in which the rank was at each kind of work; they overlap
    spans: list[Span]


class StageReport(BaseModel):
    """The whole stage."""

    model_config = ConfigDict(frozen=True)

    location: str
    optimizer_key: str
    world_size: int
    strategy: str  # of each node where they differ
    strategy_reason: str
    unique_bytes_needed: int
    storage_bytes_read: int
    read_amplification: float  # storage_bytes_read / unique_bytes_needed
    num_requests: int
    missing: list[str] = []  # FQNs that some rank wants and the checkpoint hasn't
    unexpected: list[str] = []  # FQNs that the checkpoint has and no rank wants
    phases: dict[str, float]  # seconds; of the slowest rank where ranks work side by side
    busy: dict[str, float] = {}  # alike: what the phase "read" is made of
    lower_bound_s: float
    lower_bound_terms: dict[str, float] = {}  # seconds that each limit alone would take; the longest counts
    ratio_to_lower_bound: float  # seconds of planning and reading over the lower bound
    ranks: list[RankReport]
