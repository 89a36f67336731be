"""Runs against every byte of them, counted one by one."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardferry.storage import runs as module
from shardferry.storage.runs import Runs


@st.composite
def any_runs(draw: st.DrawFn) -> Runs:
    """Nested runs that don't overlap, as a box of a dense tensor makes them."""
    run_bytes = extent = draw(st.integers(1, 4))
    counts, strides = [], []
    for _ in range(draw(st.integers(0, 3))):
        counts.insert(0, draw(st.integers(1, 4)))
        strides.insert(0, extent + draw(st.integers(0, 6)))
        extent = strides[0] * counts[0]
    return Runs(draw(st.integers(0, 9)), run_bytes, tuple(counts), tuple(strides))


def wanted_bytes(runs: Runs) -> set[int]:
    starts = (
        runs.start + sum(i * s for i, s in zip(index, runs.byte_strides, strict=True))
        for index in itertools.product(*map(range, runs.counts))
    )
    return {start + i for start in starts for i in range(runs.run_bytes)}


@given(any_runs(), st.integers(0, 12), st.sampled_from([0.0, 0.3, 1.0, 1e9]), st.sampled_from([1, 5]))
def test_ranges(runs: Runs, max_gap_bytes: int, max_over_read: float, least_gap: int) -> None:
    with mock.patch.object(module, "_LEAST_GAP", least_gap):
        ranges = runs.ranges(max_gap_bytes=max_gap_bytes, max_over_read=max_over_read)
        is_one = runs.are_one_range(max_gap_bytes=max_gap_bytes, max_over_read=max_over_read)
    assert is_one == (len(ranges) == 1)
    wanted = wanted_bytes(runs)
    assert (min(wanted), max(wanted) + 1, len(wanted)) == (runs.start, runs.stop, runs.nbytes)
    asked = {byte for start, stop in ranges for byte in range(start, stop)}
    assert wanted <= asked
    assert sum(stop - start for start, stop in ranges) == len(asked)
    assert ranges == sorted(ranges)
    gaps = [start - stop for (_, stop), (start, _) in itertools.pairwise(ranges)]
    assert all(gap > max_gap_bytes for gap in gaps) or max_over_read < 1e9
    for start, stop in ranges:
        inside = sorted(wanted & set(range(start, stop)))
        assert (inside[0], inside[-1]) == (start, stop - 1)
        read_over = [after - before - 1 for before, after in itertools.pairwise(inside)]
        assert max(read_over, default=0) <= max_gap_bytes
        assert sum(gap for gap in read_over if gap >= least_gap) <= max_over_read * len(inside)


@pytest.mark.parametrize(
    ("max_gap_bytes", "ranges"),
    [(0, [(10, 12), (20, 22), (50, 52), (60, 62)]), (8, [(10, 22), (50, 62)]), (28, [(10, 62)])],
)
def test_small_gaps_are_fetched_too(max_gap_bytes: int, ranges: list[tuple[int, int]]) -> None:
    assert Runs(10, 2, (2, 2), (40, 10)).ranges(max_gap_bytes=max_gap_bytes, max_over_read=0.0) == ranges
