"""The report of a finished load: the JSON of ``shardferry run --report``."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from shardferry.stats import StorageRequest, Work


class Span(BaseModel):
    """One phase of one rank; start and end in seconds since the epoch."""

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
    num_retries: int = 0  # of requests that failed with a transient error
    arena_bytes: int
    peak_rss_bytes: int
    transport: str
    strategy: str
    strategy_reason: str
    host_copy_bandwidth: (
        float  # bytes per second of copies in host memory, measured after the load; for the lower bound
    )
    device_copy_bandwidth: float | None = None  # bytes per second to the GPU; None: the arena is in host memory
    bytes_forwarded: int = 0  # to ranks that share no memory with this one
    missing: list[str] = []  # FQNs that the rank needs and the checkpoint doesn't have, if allowed
    unexpected: list[str] = []  # FQNs that the checkpoint has and no rank needs, if allowed
    phases: dict[str, float]  # seconds; phases don't overlap
    busy: dict[str, float] = {}  # seconds of each kind of work in the phase "read"; kinds overlap
    work: tuple[Work, ...] = ()  # when each kind of work was done; busy has its seconds without the pauses
    spans: list[Span]
    file_bytes: dict[str, int] = {}  # asked of the storage, by file
    requests: tuple[StorageRequest, ...] = Field(
        (), exclude=True
    )  # for the trace; some of them where there are very many


def what_is_loaded(optimizer_key: str | None) -> str:
    """For titles: the optimizer's key in quotes, or that weights alone are loaded."""
    return "weights" if optimizer_key is None else repr(optimizer_key)


class StageReport(BaseModel):
    """The whole stage."""

    model_config = ConfigDict(frozen=True)

    location: str
    model_location: str | None = None  # of the weights, where that is another checkpoint
    optimizer_key: str | None
    world_size: int
    strategy: str  # all of them, if nodes differ
    strategy_reason: str
    unique_bytes_needed: int
    storage_bytes_read: int
    read_amplification: float  # storage_bytes_read / unique_bytes_needed
    num_requests: int
    num_retries: int = 0
    missing: list[str] = []  # FQNs that some rank needs and the checkpoint doesn't have
    unexpected: list[str] = []  # FQNs that the checkpoint has and no rank needs
    missing_entries: list[str] = []  # <fqn>.<name>: state that the optimizer makes and that was not saved, if allowed
    unexpected_entries: list[
        str
    ] = []  # <fqn>.<name>: state that was saved and the optimizer has no use for, if allowed
    overwritten: list[tuple[int, str, str, str]] = []  # hyperparameters of trainers: group, name, old and new value
    warnings: list[str] = []
    saved_as: dict[str, int] = {}  # how the checkpoint's tensors were sharded, in words: number of tensors
    mesh: dict[str, int] = {}  # of the spec; empty where the trainers were asked
    total_s: float = 0.0  # from the opening of the checkpoint to the end of the last phase
    storage_bytes_per_s: float | None = None  # of all ranks, while requests were in flight; None: nothing was read
    phases: dict[str, float]  # seconds; of the slowest rank
    busy: dict[str, float] = {}  # seconds of each kind of work in the phase "read"; of the busiest rank
    lower_bound_s: float | None  # None: the storage's rate is not known
    lower_bound_terms: dict[str, float] = {}  # seconds, by the resource that limits; the largest counts
    ratio_to_lower_bound: float | None  # seconds of planning and reading over the lower bound
    versions: dict[str, str] = {}  # by program
    command: str = ""  # that made the report
    finished: str = ""  # date and time, ISO 8601, UTC
    ranks: list[RankReport]


class RankProgress(BaseModel):
    """How far one rank came."""

    model_config = ConfigDict(frozen=True)

    rank: int
    bytes_done: int
    bytes_needed: int  # 0: the rank had not planned yet
    phase: str = ""  # that it was last seen in; empty: it did not load yet
    idle_s: float | None = (
        None  # at the failure: seconds since the rank's last byte, or since the first look; None: it had all
    )


class FailedStage(BaseModel):
    """A stage that failed: the error, and how far each rank came."""

    model_config = ConfigDict(frozen=True)

    location: str
    optimizer_key: str | None
    world_size: int
    error: str
    error_type: str  # of `shardferry.errors`
    failed_ranks: list[int] = []  # those that the error names
    total_s: float  # until the failure
    versions: dict[str, str] = {}
    command: str = ""
    finished: str = ""
    ranks: list[RankProgress]
