"""Foretell how long a load takes where every rank reads for itself, and where ranks read for each other.

What storage gives is measured (probe.py); what copies and the process group give is what benchmarks/copies.py found, with both sides
at it. Only the comparison counts, so that errors common to both don't matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from shardferry.checkpoint.catalog import Catalog
from shardferry.plan.cooperative import SharedPlan
from shardferry.plan.plan_sample import PlanSample
from shardferry.plan.predict import predict_reads
from shardferry.read.coalesce import JoinLimits

_ARENA_BYTES_PER_S = 2.5e9  # written into another rank's arena, by one rank
_GROUP_BYTES_PER_S = 1.4e9  # through the process group, by one rank (gloo over TCP)
_CLEARLY = 0.95  # reads are shared only where that is better by so much


@dataclass(frozen=True, slots=True)
class StorageRates:
    """What one rank gets of a storage while the others ask too."""

    latency_s: float  # of a small request
    bytes_per_s: float  # of some large ones side by side
    shares_reads: bool  # what one rank of a node has read, the others find in memory


@dataclass(frozen=True, slots=True)
class Work:
    """What one rank does in a load."""

    bytes_read: int
    num_requests: int
    bytes_delivered: int = 0  # into arenas of its island, for others
    bytes_forwarded: int = 0  # to other islands

    @classmethod
    def of(cls, sample: PlanSample, catalog: Catalog, limits: JoinLimits, shared: SharedPlan | None = None) -> Self:
        """Of the plan that a sample was taken of.

        Args:
            shared: the sample's part in shared reads; None where the rank reads for itself.
        """
        tensors_alone = replace(sample.plan, objects=())  # what one rank reads for all is alike in both ways
        nbytes, num_requests = predict_reads(tensors_alone, catalog, limits, shared)
        sent, forwarded = (0, 0) if shared is None else (shared.bytes_sent, shared.bytes_forwarded)
        return cls(
            round(nbytes * sample.times_bytes),
            round(num_requests * sample.times_reads),
            round(sent * sample.times_bytes),
            round(forwarded * sample.times_bytes),
        )


@dataclass(frozen=True, slots=True)
class RankCosts:
    """One rank's part of each way to load."""

    direct: Work
    direct_from_storage: Work  # what is left of that where the page cache of its node has what others read
    cooperative: Work
    rates: StorageRates | None  # None: what it reads is in memory
    concurrency: int  # requests


@dataclass(frozen=True, slots=True)
class Choice:
    """Which way, and why in words."""

    is_cooperative: bool
    reason: str


def compare(ranks: Sequence[RankCosts]) -> Choice:
    """The quicker way for the slowest rank."""
    direct, cooperative = max(map(_direct_s, ranks)), max(map(_cooperative_s, ranks))
    asked = sum(rank.direct.bytes_read for rank in ranks)
    needed = sum(rank.cooperative.bytes_read for rank in ranks)
    rates = [rank.rates for rank in ranks if rank.rates is not None]
    slowest = min(rates, key=lambda rate: rate.bytes_per_s)
    reason = (
        f"reading for each other would take {cooperative:.3g} s, every rank for itself {direct:.3g} s and "
        f"{asked / max(needed, 1):.2f} times the bytes, where the storage gives a rank {slowest.bytes_per_s / 1e6:.0f} MB/s "
        f"after {slowest.latency_s * 1e3:.2g} ms"
    )
    return Choice(cooperative < _CLEARLY * direct, reason)


def _direct_s(rank: RankCosts) -> float:
    return _read_s(rank, rank.direct_from_storage) + rank.direct.bytes_read / _ARENA_BYTES_PER_S


def _cooperative_s(rank: RankCosts) -> float:
    work = rank.cooperative
    copying = work.bytes_delivered / _ARENA_BYTES_PER_S + work.bytes_forwarded / _GROUP_BYTES_PER_S
    return _read_s(rank, work) + work.bytes_read / _ARENA_BYTES_PER_S + copying


def _read_s(rank: RankCosts, work: Work) -> float:
    if rank.rates is None:
        return 0.0
    waiting = -(-work.num_requests // max(rank.concurrency, 1)) * rank.rates.latency_s
    return waiting + work.bytes_read / rank.rates.bytes_per_s
