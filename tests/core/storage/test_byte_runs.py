"""Byte runs against every byte of them, counted one by one."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardferry.storage.base import ByteRuns


@st.composite
def any_runs(draw: st.DrawFn) -> ByteRuns:
    """Nested runs that don't overlap, as a box of a dense tensor makes them."""
    run_bytes = extent = draw(st.integers(1, 4))
    counts, strides = [], []
    for _ in range(draw(st.integers(0, 3))):
        counts.insert(0, draw(st.integers(1, 4)))
        strides.insert(0, extent + draw(st.integers(0, 6)))
        extent = strides[0] * counts[0]
    return ByteRuns(draw(st.integers(0, 9)), run_bytes, tuple(counts), tuple(strides))


def wanted_bytes(runs: ByteRuns) -> set[int]:
    starts = (
        runs.start + sum(i * s for i, s in zip(index, runs.byte_strides, strict=True))
        for index in itertools.product(*map(range, runs.counts))
    )
    return {start + i for start in starts for i in range(runs.run_bytes)}


@given(any_runs(), st.integers(0, 12), st.sampled_from([0.0, 0.3, 1.0, 1e9]), st.sampled_from([1, 5]))
def test_one_range_keeps_its_limits(runs: ByteRuns, max_gap: int, max_over_read: float, free_gap: int) -> None:
    wanted = wanted_bytes(runs)
    assert (min(wanted), max(wanted) + 1, len(wanted)) == (runs.start, runs.stop, runs.nbytes)
    gaps = [after - before - 1 for before, after in itertools.pairwise(sorted(wanted))]
    unwanted = sum(gap for gap in gaps if gap >= free_gap)
    keeps = max(gaps, default=0) <= max_gap and unwanted <= max_over_read * len(wanted)
    is_one = runs.are_one_range(max_gap_bytes=max_gap, max_over_read=max_over_read, free_gap_bytes=free_gap)
    assert keeps or not is_one
    # From the inside out: inner runs that are mostly unwanted stay apart, even if the whole would keep the limits.
    assert is_one or not keeps or max_over_read < 1e9


@pytest.mark.parametrize(("max_gap_bytes", "is_one"), [(0, False), (8, False), (27, False), (28, True)])
def test_a_long_gap_is_another_range(max_gap_bytes: int, is_one: bool) -> None:
    runs = ByteRuns(10, 2, (2, 2), (40, 10))
    assert runs.are_one_range(max_gap_bytes=max_gap_bytes, max_over_read=0.0, free_gap_bytes=4096) is is_one


@pytest.mark.parametrize(
    ("max_over_read", "free_gap_bytes", "is_one"), [(5.4, 1, False), (5.5, 1, True), (0.0, 29, True)]
)
def test_unwanted_bytes_are_bounded_unless_the_gap_is_free(
    max_over_read: float, free_gap_bytes: int, is_one: bool
) -> None:
    """Runs [10, 12), [20, 22), [50, 52), [60, 62): 44 unwanted bytes in gaps of 8, 28 and 8, 8 wanted ones."""
    runs = ByteRuns(10, 2, (2, 2), (40, 10))
    assert runs.are_one_range(max_gap_bytes=99, max_over_read=max_over_read, free_gap_bytes=free_gap_bytes) is is_one
