"""Run one case on live ranks: every contender in turn, round after round, each result checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.cases import Case
from benchmarks.contenders import Contender, Task, contenders_of
from benchmarks.meter import Spent, spend


@dataclass(frozen=True, slots=True)
class Sample:
    """One load by one contender on one rank."""

    contender: str
    fresh: bool  # the destination was allocated by the load, not before
    spent: Spent
    bytes_asked: int
    requests: int
    phases: Mapping[str, float]  # seconds


@dataclass(frozen=True, slots=True)
class RankRun:
    """All samples of one rank, and what it had to load."""

    shard_bytes: int
    unique_bytes: int  # of the whole job
    samples: Sequence[Sample]


@dataclass(frozen=True, slots=True)
class Figures:
    """One contender in one case, over all ranks: medians over the rounds."""

    wall_s: float  # from the first rank's start to the last one's end; destinations touched
    cpu_s: float  # of all ranks
    fresh_wall_s: float  # the same with destinations allocated by the load
    fresh_cpu_s: float
    bytes_asked: int  # of all ranks
    unique_bytes: int  # what all ranks need, each byte once
    worst_rank_ratio: float  # bytes asked over bytes needed, of the rank where it is highest
    requests: int  # of all ranks
    peak_over_shard: int  # bytes of resident memory beyond the shard, of the rank where it is highest
    phases: Mapping[str, float]  # seconds, of the rank that took longest in each
    walls_s: Sequence[float]  # of each round


def run_case(case: Case, path: str, shapes: Mapping[str, tuple[int, ...]], rounds: int) -> RankRun:
    """On each rank: all rounds of a case. Contenders alternate, and another one begins each round.

    Each round loads into touched destinations, for the time, and into fresh ones, for the time and the peak memory. The
    first round is not counted: it pays for imports and first calls.

    Raises:
        WrongResult: a contender's result is not what was saved.
    """
    task = Task.of_this_rank(case, path, shapes)
    contenders = [kind(task) for kind in contenders_of(case)]
    samples: list[Sample] = []
    for turn in range(rounds + 1):
        first = turn % len(contenders)
        for fresh in (False, True):
            for contender in contenders[first:] + contenders[:first]:
                sample = _load(contender, fresh=fresh)
                if turn:
                    samples.append(sample)
    return RankRun(task.shard_bytes, task.needed_bytes, samples)


def _load(contender: Contender, *, fresh: bool) -> Sample:
    if not fresh:
        contender.prepare()
    spent = spend(contender.load)
    contender.check()
    contender.release()
    asked, requests = contender.asked_of_storage(spent)
    return Sample(contender.name, fresh, spent, asked, requests, dict(contender.phases()))


def summarize(case: Case, runs: Sequence[RankRun]) -> dict[str, Figures]:
    """Figures of each contender, by name, from the samples of all ranks."""
    return {kind.name: _figures(kind.name, runs) for kind in contenders_of(case)}


def _figures(name: str, runs: Sequence[RankRun]) -> Figures:
    touched, fresh = _rounds(name, runs, fresh=False), _rounds(name, runs, fresh=True)
    needed = [run.shard_bytes for run in runs]
    walls = [_wall(samples) for samples in touched]
    return Figures(
        wall_s=median(walls),
        cpu_s=median(_cpu(samples) for samples in touched),
        fresh_wall_s=median(_wall(samples) for samples in fresh),
        fresh_cpu_s=median(_cpu(samples) for samples in fresh),
        bytes_asked=round(median(sum(s.bytes_asked for s in samples) for samples in touched)),
        unique_bytes=runs[0].unique_bytes,
        worst_rank_ratio=median(
            max(s.bytes_asked / rank_bytes for s, rank_bytes in zip(samples, needed, strict=True))
            for samples in touched
        ),
        requests=round(median(sum(s.requests for s in samples) for samples in touched)),
        peak_over_shard=round(
            median(
                max(s.spent.peak_bytes - rank_bytes for s, rank_bytes in zip(samples, needed, strict=True))
                for samples in fresh
            )
        ),
        phases={
            phase: median(max(s.phases[phase] for s in samples) for samples in touched)
            for phase in touched[0][0].phases
        },
        walls_s=walls,
    )


def _rounds(name: str, runs: Sequence[RankRun], *, fresh: bool) -> list[tuple[Sample, ...]]:
    """By round, the samples of all ranks."""
    of_ranks = [[s for s in run.samples if s.contender == name and s.fresh == fresh] for run in runs]
    return list(zip(*of_ranks, strict=True))


def _wall(samples: Sequence[Sample]) -> float:
    return max(s.spent.stop_s for s in samples) - min(s.spent.start_s for s in samples)


def _cpu(samples: Sequence[Sample]) -> float:
    return sum(s.spent.cpu_s for s in samples)
