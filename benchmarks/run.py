"""Run one case on live ranks: every contender in turn, round after round, each result checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from benchmarks.cases import Case
from benchmarks.contenders import contenders_of
from benchmarks.meter import Spent, make_pages_ready, spend
from benchmarks.models import Shapes
from benchmarks.stores import Store, StoreKind
from benchmarks.task import Contender, OwnFormat, Task


@dataclass(frozen=True, slots=True)
class Sample:
    """One load by one contender on one rank."""

    contender: str
    fresh: bool  # the destination was allocated by the load, not before
    spent: Spent
    bytes_asked: int  # of the storage; where a server counts, rank 0 has those of all ranks
    requests: int
    peak_over_shard: int  # bytes of resident memory beyond the destination
    warm_share: float  # of the files: in the page cache before the load, where nothing should be
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
    fresh_wall_s: float | None  # the same with destinations allocated by the load; None where that was not measured
    fresh_cpu_s: float | None
    bytes_asked: int  # of all ranks
    unique_bytes: int  # what all ranks need, each byte once
    requests: int  # of all ranks
    peak_over_shard: int  # bytes of resident memory beyond the shard, of the rank where it is highest
    warm_share: float  # the largest of all rounds
    phases: Mapping[str, float]  # seconds, of the rank that took longest in each
    walls_s: Sequence[float]  # of each round
    fresh_walls_s: Sequence[float]

    @property
    def bytes_ratio(self) -> float:
        return self.bytes_asked / self.unique_bytes


def variants(case: Case, kind: StoreKind) -> tuple[bool, ...]:
    """Whether destinations are fresh: both, where the page cache is warm, so that touching memory is to be seen."""
    return (False, True) if kind is StoreKind.WARM and case.model == "gpt" else (False,)


def run_case(case: Case, store: Store, shapes: Shapes, rounds: int, *, ours_alone: bool = False) -> RankRun:
    """On each rank: all rounds of a case. Contenders alternate, and another one begins each round.

    The first round is not counted: it pays for imports and first calls.

    Raises:
        WrongResult: a contender's result is not what was saved.
    """
    task = Task.of_this_rank(case, store, shapes)
    contenders = [kind(task) for kind in contenders_of(case, store.kind, ours_alone=ours_alone)]
    samples: list[Sample] = []
    for turn in range(rounds + 1):
        first = turn % len(contenders)
        for fresh in variants(case, store.kind):
            for contender in contenders[first:] + contenders[:first]:
                sample = _load(contender, task, fresh=fresh)
                if turn:
                    samples.append(sample)
    return RankRun(task.shard_bytes, task.needed_bytes, samples)


def _load(contender: Contender, task: Task, *, fresh: bool) -> Sample:
    if fresh:
        make_pages_ready(task.shard_bytes)
    else:
        contender.prepare()
    store, leads = task.store, task.rank == 0
    files = store.sibling(contender.name) if isinstance(contender, OwnFormat) else store
    warm_share = files.make_ready() if leads else 0.0
    served_before = store.asked() if leads else None
    spent = spend(contender.load)  # between two barriers
    served = store.asked() if leads else None
    contender.check()
    contender.release()
    allocated = task.shard_bytes if fresh or contender.allocates else 0
    sample = Sample(
        contender.name,
        fresh,
        spent,
        *contender.asked_of_storage(spent),
        max(spent.peak_bytes - allocated, 0),
        warm_share,
        dict(contender.phases()),
    )
    if not store.is_remote:
        return sample
    if served is None or served_before is None:
        return replace(sample, bytes_asked=0, requests=0)
    num_bytes, requests = (now - before for now, before in zip(served, served_before, strict=True))
    return replace(sample, bytes_asked=num_bytes, requests=requests)


def summarize(runs: Sequence[RankRun]) -> dict[str, Figures]:
    """Figures of each contender, by name, from the samples of all ranks."""
    names = dict.fromkeys(sample.contender for sample in runs[0].samples)
    return {name: _figures(name, runs) for name in names}


def _figures(name: str, runs: Sequence[RankRun]) -> Figures:
    touched, fresh = _rounds(name, runs, fresh=False), _rounds(name, runs, fresh=True)
    walls, fresh_walls = [_wall(samples) for samples in touched], [_wall(samples) for samples in fresh]
    return Figures(
        wall_s=median(walls),
        cpu_s=median(_cpu(samples) for samples in touched),
        fresh_wall_s=median(fresh_walls) if fresh else None,
        fresh_cpu_s=median(_cpu(samples) for samples in fresh) if fresh else None,
        bytes_asked=round(median(sum(s.bytes_asked for s in samples) for samples in touched)),
        unique_bytes=runs[0].unique_bytes,
        requests=round(median(sum(s.requests for s in samples) for samples in touched)),
        peak_over_shard=round(median(max(s.peak_over_shard for s in samples) for samples in fresh or touched)),
        warm_share=max(s.warm_share for samples in touched for s in samples),
        phases={
            phase: median(max(s.phases[phase] for s in samples) for samples in touched)
            for phase in touched[0][0].phases
        },
        walls_s=walls,
        fresh_walls_s=fresh_walls,
    )


def _rounds(name: str, runs: Sequence[RankRun], *, fresh: bool) -> list[tuple[Sample, ...]]:
    """By round, the samples of all ranks."""
    of_ranks = [[s for s in run.samples if s.contender == name and s.fresh == fresh] for run in runs]
    return list(zip(*of_ranks, strict=True))


def _wall(samples: Sequence[Sample]) -> float:
    return max(s.spent.stop_s for s in samples) - min(s.spent.start_s for s in samples)


def _cpu(samples: Sequence[Sample]) -> float:
    return sum(s.spent.cpu_s for s in samples)
