"""Busy times with a clock that only the test moves."""

from __future__ import annotations

import pytest

from shardferry import stats as busy
from shardferry.stats import BusyTimes


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(busy.time, "perf_counter", lambda: now[0])
    return now


def test_threads_at_the_same_work_count_once(clock: list[float]) -> None:
    times = BusyTimes()
    first, second = times.at("storage"), times.at("storage")
    first.__enter__()
    clock[0] = 1
    second.__enter__()
    clock[0] = 3
    first.__exit__(None, None, None)
    clock[0] = 4
    assert times.seconds == {}, "one is still at it"
    second.__exit__(None, None, None)
    clock[0] = 10
    with times.at("storage"):
        clock[0] = 11
    assert times.seconds == {"storage": 5.0}
    [work] = times.work
    assert (work.kind, work.end - work.start) == ("storage", 11.0), "from the first start to the last end"


def test_kinds_overlap_and_failures_count(clock: list[float]) -> None:
    times = BusyTimes()

    def fail() -> None:
        with times.at("storage"), times.at("exchange"):
            clock[0] = 2
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert times.seconds == {"storage": 2.0, "exchange": 2.0}
