"""How many reads are under way: on clocks and storages that are made up."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

import pytest

from shardferry.read.ramp import Ramp

MB = 1_000_000


def simulated(ramp: Ramp, seconds_of: Callable[[int], float], *, num_reads: int, nbytes: int = 4 * MB) -> list[int]:
    """Read with as many streams as the ramp allows; the limit after each read.

    Args:
        seconds_of: what one read takes while so many are under way.
    """
    now_s, ends, limits, begun = 0.0, [], [], 0
    ramp.begin(now_s)
    while len(limits) < num_reads:
        while len(ends) < ramp.limit and begun < num_reads:
            begun += 1
            heapq.heappush(ends, now_s + seconds_of(len(ends) + 1))
        now_s = heapq.heappop(ends)
        ramp.done(nbytes, now_s)
        limits.append(ramp.limit)
    return limits


def streams(per_stream: float, total: float, latency_s: float) -> Callable[[int], float]:
    """A storage with a limit of each stream and of all together, in bytes a second."""
    return lambda under_way: latency_s + 4 * MB / min(per_stream, total / under_way)


@pytest.mark.parametrize("most", [16, 20])
def test_a_store_that_is_limited_by_each_stream_gets_as_many_as_it_may(most: int) -> None:
    limits = simulated(Ramp(first=4, most=most), streams(25 * MB, 1e12, 0.02), num_reads=200)
    assert limits.index(16) <= 4 + 2 * 8, "within three rounds of reads"
    assert limits[-1] == most


def test_a_store_that_is_limited_in_all_gets_no_more_than_it_serves() -> None:
    limits = simulated(Ramp(first=4, most=64), streams(50 * MB, 400 * MB, 0.001), num_reads=400)
    assert limits[-1] == 8
    assert max(limits) <= 16, "tried, and taken back"


def test_latency_alone_is_hidden_by_many() -> None:
    limits = simulated(Ramp(first=4, most=64), lambda _: 0.02, num_reads=400, nbytes=64)
    assert limits[-1] == 64


@pytest.mark.parametrize("cores", [1, 2, 8])
def test_copies_out_of_memory_stay_at_a_thread_a_core(cores: int) -> None:
    limits = simulated(Ramp(first=cores, most=16), lambda under_way: 0.004 * max(1, under_way / cores), num_reads=400)
    assert limits[-1] == cores


def noises() -> Iterator[float]:
    seed = 7
    while True:
        seed = seed * 1_103_515_245 % 2**31
        yield 0.92 + 0.16 * seed / 2**31


def test_noise_is_no_growth() -> None:
    noise = noises()
    limits = simulated(
        Ramp(first=2, most=64), lambda under_way: next(noise) * 0.004 * max(1, under_way / 2), num_reads=2_000
    )
    assert limits[-1] == 2


def test_the_limit_is_never_passed() -> None:
    assert Ramp(first=8, most=3).limit == 3
    assert set(simulated(Ramp(first=1, most=1), lambda _: 0.01, num_reads=50)) == {1}


def test_other_work_is_judged_anew_from_where_the_limit_stands() -> None:
    ramp = Ramp(first=4, most=64)
    simulated(ramp, lambda _: 0.02, num_reads=60)
    before = ramp.limit
    assert before >= 16
    limits = simulated(ramp, streams(50 * MB, 400 * MB, 0.001), num_reads=400)
    assert limits[-1] == before, "more bring nothing, and fewer are not tried"
