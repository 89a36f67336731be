"""From a box of a strided item to byte ranges: each wanted byte once, where it belongs, and no window too wide."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardferry.config import ReadLimits, ReadOptions
from shardferry.read.requests import ContiguousRead, Request, requests_for
from shardferry.read.zip_header import ItemLayout
from shardferry.region import BoxCopy, Region, row_major_strides
from shardferry.storage.local import LOCAL_FILES

RAW_START = 24
ITEMSIZE = 2
UNTOUCHED = 0xEE
FREE_GAP = 3  # bytes
LOCAL = LOCAL_FILES.read_limits(ReadOptions())


def layout_of(shape: tuple[int, ...], order: tuple[int, ...], storage_offset: int) -> ItemLayout:
    """An item whose dimensions lie in memory in the given order, the last innermost."""
    packed = row_major_strides([shape[d] for d in order])
    strides = [0] * len(shape)
    for place, dim in enumerate(order):
        strides[dim] = packed[place]
    return ItemLayout(RAW_START, torch.int16, shape, tuple(strides), storage_offset)


@st.composite
def wanted_boxes(draw: st.DrawFn) -> tuple[ItemLayout, Region, tuple[int, ...], int]:
    """An item, a box of it, and how the box lies in an arena: strides in elements, offset in bytes."""
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    layout = layout_of(shape, tuple(draw(st.permutations(range(len(shape))))), draw(st.integers(0, 3)))
    offsets = tuple(draw(st.integers(0, n - 1)) for n in shape)
    sizes = tuple(draw(st.integers(1, n - o)) for n, o in zip(shape, offsets, strict=True))
    local = [size + draw(st.integers(0, 2)) for size in sizes]
    return layout, Region(offsets, sizes), row_major_strides(local), ITEMSIZE * draw(st.integers(0, 3))


def carry_out(request: Request, item: np.ndarray, arena: np.ndarray, arena_offset: int) -> None:
    """Do what the request says, element by element; a byte of the arena is written once at most."""
    if isinstance(request, ContiguousRead):
        place = slice(arena_offset + request.offset, arena_offset + request.offset + request.wanted_bytes)
        assert (arena[place] == UNTOUCHED).all()
        arena[place] = item[request.start : request.stop]
        return
    for index in itertools.product(*map(range, request.sizes)):
        source = request.start + ITEMSIZE * sum(i * s for i, s in zip(index, request.source_strides, strict=True))
        target = ITEMSIZE * sum(i * s for i, s in zip(index, request.strides, strict=True))
        target += arena_offset + request.offset
        assert source + ITEMSIZE <= request.stop
        assert (arena[target : target + ITEMSIZE] == UNTOUCHED).all()
        arena[target : target + ITEMSIZE] = item[source : source + ITEMSIZE]


def any_limits() -> st.SearchStrategy[ReadLimits]:
    return st.builds(
        ReadLimits,
        max_gap_bytes=st.sampled_from([0, 4, 64 * 1024]),
        max_over_read=st.sampled_from([0.0, 0.3, 2.0, 1e9]),
        max_request_bytes=st.sampled_from([4, 10, 32, 8 * 1024 * 1024]),
        max_item_bytes=st.just(0),
        maps_files=st.booleans(),
        free_gap_bytes=st.just(FREE_GAP),
        long_run_bytes=st.sampled_from([2, 6, 16, 64 * 1024]),
    )


def check_limits(request: Request, limits: ReadLimits) -> None:
    """Of one request; by brute force over the bytes that it wants."""
    if isinstance(request, ContiguousRead):
        assert request.wanted_bytes <= limits.max_request_bytes
        return
    window_bytes = request.stop - request.start
    assert window_bytes <= limits.max_request_bytes
    wanted: set[int] = set()
    for index in itertools.product(*map(range, request.sizes)):
        start = ITEMSIZE * sum(i * s for i, s in zip(index, request.source_strides, strict=True))
        wanted.update(range(start, start + ITEMSIZE))
    assert (min(wanted), max(wanted)) == (0, window_bytes - 1)
    if limits.maps_files:  # the gaps are not fetched
        return
    gaps = [after - before - 1 for before, after in itertools.pairwise(sorted(wanted))]
    assert max(gaps, default=0) <= limits.max_gap_bytes
    assert sum(gap for gap in gaps if gap >= FREE_GAP) <= limits.max_over_read * len(wanted)


@given(wanted_boxes(), any_limits())
def test_each_wanted_byte_goes_once_to_its_place(
    wanted: tuple[ItemLayout, Region, tuple[int, ...], int], limits: ReadLimits
) -> None:
    layout, box, strides, arena_offset = wanted
    item = np.arange(RAW_START + ITEMSIZE * (3 + 5**4), dtype=np.uint16).view(np.uint8)[: RAW_START + ITEMSIZE * 628]
    item = np.where(item == UNTOUCHED, 0, item).astype(np.uint8)
    arena = np.full(4 * ITEMSIZE + ITEMSIZE * 7**4, UNTOUCHED, dtype=np.uint8)
    expected = arena.copy()
    for index in itertools.product(*map(range, box.sizes)):
        source = layout.byte_position(tuple(o + i for o, i in zip(box.offsets, index, strict=True)))
        target = arena_offset + ITEMSIZE * sum(i * s for i, s in zip(index, strides, strict=True))
        expected[target : target + ITEMSIZE] = item[source : source + ITEMSIZE]

    found = requests_for(layout, BoxCopy(box, 0, strides), limits)
    assert [one.start for one in found] == sorted(one.start for one in found)
    for request in found:
        carry_out(request, item, arena, arena_offset)
        check_limits(request, limits)

    assert (arena == expected).all()
    assert sum(request.wanted_bytes for request in found) == box.numel * ITEMSIZE


@pytest.mark.parametrize("long_run_bytes", [2, 64 * 1024])
def test_rows_of_a_row_major_item_are_one_request(long_run_bytes: int) -> None:
    layout = layout_of((8, 6), (0, 1), 0)
    copy = BoxCopy(Region((2, 0), (4, 6)), 0, (6, 1))
    start = RAW_START + 2 * 6 * ITEMSIZE
    found = requests_for(layout, copy, replace(LOCAL, long_run_bytes=long_run_bytes))
    assert found == [ContiguousRead(start, start + 4 * 6 * ITEMSIZE, 0)]


def test_an_empty_box_asks_for_nothing() -> None:
    layout = layout_of((4, 6), (0, 1), 0)
    assert requests_for(layout, BoxCopy(Region((0, 0), (4, 0)), 0, (0, 1)), LOCAL) == []
