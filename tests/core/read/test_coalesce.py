"""Coalescing: every range is in one request, and the limits hold; against brute force over random files."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardferry.config import ReadLimits
from shardferry.read.coalesce import (
    WantedRange,
    coalesce,
    header_is_one_request,
    is_small,
    strided_is_one_request,
)

FREE_GAP = 3  # bytes


def limits_of(*, gap: int, request: int = 1 << 30, over_read: float = 1e9) -> ReadLimits:
    return ReadLimits(
        max_gap_bytes=gap,
        max_over_read=over_read,
        max_request_bytes=request,
        max_item_bytes=request,
        free_gap_bytes=FREE_GAP,
    )


@st.composite
def files(draw: st.DrawFn) -> list[WantedRange]:
    """Ascending ranges with gaps, each wanted in part."""
    ranges, position = [], 0
    for _ in range(draw(st.integers(0, 12))):
        position += draw(st.integers(0, 6))
        length = draw(st.integers(1, 12))
        ranges.append(WantedRange(position, position + length, draw(st.integers(1, length))))
        position += length
    return ranges


def over_read_of(ranges: Sequence[WantedRange]) -> int:
    """Bytes that nobody wants, in runs of at least FREE_GAP."""
    gaps = [after.start - before.stop for before, after in itertools.pairwise(ranges)]
    inside = [one.stop - one.start - one.wanted_bytes for one in ranges]
    return sum(nbytes for nbytes in (*gaps, *inside) if nbytes >= FREE_GAP)


@given(files(), st.integers(0, 5), st.integers(1, 40), st.sampled_from([0.0, 0.2, 0.5, 3.0]))
def test_requests_keep_the_limits(ranges: list[WantedRange], gap: int, request: int, over_read: float) -> None:
    limits = limits_of(gap=gap, request=request, over_read=over_read)
    groups = [ranges[members] for members in coalesce(ranges, limits)]
    assert [one for group in groups for one in group] == ranges, "each range once, in order"
    for group in groups:
        if len(group) == 1:
            continue
        assert group[-1].stop - group[0].start <= request
        assert max(after.start - before.stop for before, after in itertools.pairwise(group)) <= gap
        assert over_read_of(group) <= over_read * sum(one.wanted_bytes for one in group)


@given(files(), st.integers(0, 5), st.integers(1, 40))
def test_no_two_neighbours_are_left_apart_without_a_reason(ranges: list[WantedRange], gap: int, request: int) -> None:
    limits = limits_of(gap=gap, request=request)
    groups = [ranges[members] for members in coalesce(ranges, limits)]
    for before, after in itertools.pairwise(groups):
        is_large = not all(is_small(one, limits) for one in (before[-1], after[0]))
        is_far = after[0].start - before[-1].stop > gap
        assert is_large or is_far or after[0].stop - before[0].start > request


@pytest.mark.parametrize(
    ("wanted_bytes", "gap", "over_read", "is_wanted"),
    [
        pytest.param(100, 0, 0.0, True, id="all of it"),
        pytest.param(98, 2, 0.0, True, id="a free gap"),
        pytest.param(90, 10, 0.2, True, id="within the over-read"),
        pytest.param(90, 10, 0.1, False, id="too much over-read"),
        pytest.param(90, 9, 9.0, False, id="too wide a gap"),
    ],
)
def test_whether_a_range_is_small(wanted_bytes: int, gap: int, over_read: float, is_wanted: bool) -> None:
    limits = limits_of(gap=gap, over_read=over_read)
    assert is_small(WantedRange(1000, 1100, wanted_bytes), limits) == is_wanted


def test_what_is_never_coalesced() -> None:
    limits = limits_of(gap=0, request=100)
    in_two_files = [WantedRange(0, 10, 10, path="a"), WantedRange(10, 20, 10, path="b")]
    not_ranged = [WantedRange(0, 10, 10), WantedRange(10, 20, 10, is_ranged=False), WantedRange(20, 30, 10)]
    long = [WantedRange(0, 10, 10), WantedRange(10, 111, 101)]
    for ranges in (in_two_files, not_ranged, long):
        assert len(list(coalesce(ranges, limits))) == len(ranges)


HEADER = 700
REMOTE = ReadLimits(max_gap_bytes=8_000, max_over_read=0.5, max_request_bytes=100_000, max_item_bytes=0)


@pytest.mark.parametrize(
    ("start", "nbytes", "wanted_bytes", "is_one"),
    [
        pytest.param(HEADER, 50_000, 50_000, True, id="data that follows its header"),
        pytest.param(HEADER, 99_400, 99_400, False, id="together longer than a request may be"),
        pytest.param(HEADER + 4_000, 10, 10, True, id="a free gap"),
        pytest.param(HEADER + 5_000, 9_999, 9_999, False, id="more than half as much over-read"),
        pytest.param(HEADER + 5_000, 10_000, 10_000, True, id="half as much over-read"),
        pytest.param(HEADER + 8_001, 50_000, 50_000, False, id="too wide a gap"),
        pytest.param(HEADER, 90_000, 324, True, id="a window"),
        pytest.param(HEADER, 99_400, 324, False, id="a long window"),
    ],
)
def test_when_a_header_comes_with_its_data(start: int, nbytes: int, wanted_bytes: int, is_one: bool) -> None:
    assert header_is_one_request(HEADER, start, start + nbytes, wanted_bytes, REMOTE) == is_one


@st.composite
def strided_runs(draw: st.DrawFn) -> tuple[int, list[int], list[int]]:
    """Nested runs that don't overlap, as a box of a dense tensor makes them."""
    run_bytes = extent = draw(st.integers(1, 4))
    counts: list[int] = []
    strides: list[int] = []
    for _ in range(draw(st.integers(0, 3))):
        counts.insert(0, draw(st.integers(1, 4)))
        strides.insert(0, extent + draw(st.integers(0, 6)))
        extent = strides[0] * counts[0]
    return run_bytes, counts, strides


@given(strided_runs(), st.integers(0, 12), st.sampled_from([0.0, 0.3, 1.0, 1e9]))
def test_strided_runs_keep_the_limits(runs: tuple[int, list[int], list[int]], gap: int, over_read: float) -> None:
    run_bytes, counts, strides = runs
    limits = limits_of(gap=gap, over_read=over_read)
    is_one = strided_is_one_request(run_bytes=run_bytes, counts=counts, byte_strides=strides, limits=limits)
    starts = (
        sum(i * s for i, s in zip(index, strides, strict=True)) for index in itertools.product(*map(range, counts))
    )
    wanted = sorted(start + i for start in starts for i in range(run_bytes))
    gaps = [after - before - 1 for before, after in itertools.pairwise(wanted)]
    fits = max(gaps, default=0) <= gap
    within = sum(one for one in gaps if one >= FREE_GAP) <= over_read * len(wanted)
    if is_one:
        assert fits
        assert within
    elif over_read == 1e9:
        assert not fits
