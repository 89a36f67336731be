"""From a box of a strided item to byte ranges: each wanted byte once, where it belongs, and no window too wide."""

from __future__ import annotations

import itertools
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardferry.read import requests
from shardferry.read.coalesce import JoinLimits
from shardferry.read.requests import Gather, InPlaceRead, Request, brings_head, requests_for
from shardferry.read.zip_header import ItemLayout
from shardferry.region import Region, row_major_strides
from shardferry.storage.local import LOCAL_FILES

RAW_START = 24
ITEMSIZE = 2
UNTOUCHED = 0xEE
LEAST_GAP = 3  # bytes
LOCAL = JoinLimits.of(LOCAL_FILES, max_gap_bytes=None, max_request_bytes=None)


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


def carry_out(request: Request, item: np.ndarray, arena: np.ndarray) -> None:
    """Do what the request says, element by element; a byte of the arena is written once at most."""
    if isinstance(request, InPlaceRead):
        place = slice(request.arena_offset, request.arena_offset + request.nbytes)
        assert (arena[place] == UNTOUCHED).all()
        arena[place] = item[request.byte_offset : request.byte_offset + request.nbytes]
        return
    for index in itertools.product(*map(range, request.sizes)):
        source = request.window_start + ITEMSIZE * sum(
            i * s for i, s in zip(index, request.source_strides, strict=True)
        )
        target = request.arena_offset + ITEMSIZE * sum(i * s for i, s in zip(index, request.strides, strict=True))
        assert source + ITEMSIZE <= request.window_stop
        assert (arena[target : target + ITEMSIZE] == UNTOUCHED).all()
        arena[target : target + ITEMSIZE] = item[source : source + ITEMSIZE]


def any_limits() -> st.SearchStrategy[JoinLimits]:
    return st.builds(
        JoinLimits,
        max_gap_bytes=st.sampled_from([0, 4, 64 * 1024]),
        max_over_read=st.sampled_from([0.0, 0.3, 2.0, 1e9]),
        max_request_bytes=st.sampled_from([4, 10, 32, 8 * 1024 * 1024]),
        max_item_bytes=st.just(0),
        maps_files=st.booleans(),
        free_gap_bytes=st.just(LEAST_GAP),
    )


def requests_of(
    layout: ItemLayout, box: Region, limits: JoinLimits, *, arena_offset: int, strides: tuple[int, ...], long_run: int
) -> list[Request]:
    with mock.patch.object(requests, "LONG_RUN", long_run):
        return requests_for(
            layout,
            source_offsets=box.offsets,
            sizes=box.sizes,
            arena_offset=arena_offset,
            strides=strides,
            limits=limits,
        )


def check_limits(request: Request, limits: JoinLimits) -> None:
    """Of one request; by brute force over the bytes that it wants."""
    if isinstance(request, InPlaceRead):
        assert request.nbytes <= limits.max_request_bytes
        return
    asked = request.window_stop - request.window_start
    assert asked <= limits.max_request_bytes
    wanted: set[int] = set()
    for index in itertools.product(*map(range, request.sizes)):
        start = ITEMSIZE * sum(i * s for i, s in zip(index, request.source_strides, strict=True))
        wanted.update(range(start, start + ITEMSIZE))
    assert (min(wanted), max(wanted)) == (0, asked - 1)
    if limits.maps_files:  # what is between isn't read
        return
    gaps = [after - before - 1 for before, after in itertools.pairwise(sorted(wanted))]
    assert max(gaps, default=0) <= limits.max_gap_bytes
    assert sum(gap for gap in gaps if gap >= LEAST_GAP) <= limits.max_over_read * len(wanted)


@given(wanted_boxes(), st.sampled_from([2, 6, 16, 64 * 1024]), any_limits())
def test_each_wanted_byte_goes_once_to_its_place(
    wanted: tuple[ItemLayout, Region, tuple[int, ...], int], long_run: int, limits: JoinLimits
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

    found = requests_of(layout, box, limits, arena_offset=arena_offset, strides=strides, long_run=long_run)
    for request in found:
        carry_out(request, item, arena)
        check_limits(request, limits)

    assert (arena == expected).all()
    assert sum(request.nbytes for request in found) == box.numel * ITEMSIZE


@pytest.mark.parametrize("long_run", [2, 64 * 1024])
def test_rows_of_a_row_major_item_are_one_request(long_run: int) -> None:
    layout = layout_of((8, 6), (0, 1), 0)
    box = Region((2, 0), (4, 6))
    found = requests_of(layout, box, LOCAL, arena_offset=10, strides=(6, 1), long_run=long_run)
    assert found == [InPlaceRead(RAW_START + 2 * 6 * ITEMSIZE, 10, 4 * 6 * ITEMSIZE)]


def test_an_empty_box_asks_for_nothing() -> None:
    layout = layout_of((4, 6), (0, 1), 0)
    empty = Region((0, 0), (4, 0))
    assert requests_of(layout, empty, LOCAL, arena_offset=0, strides=(0, 1), long_run=2) == []


HEAD = 700
REMOTE = JoinLimits(
    max_gap_bytes=8_000, max_over_read=0.5, max_request_bytes=100_000, max_item_bytes=0, maps_files=False
)


@pytest.mark.parametrize(
    ("first", "brings"),
    [
        pytest.param(InPlaceRead(HEAD, 0, 50_000), True, id="data that follows its head"),
        pytest.param(InPlaceRead(HEAD, 0, 99_400), False, id="together longer than a request may be"),
        pytest.param(InPlaceRead(HEAD + 4_000, 0, 10), True, id="a gap that costs nothing"),
        pytest.param(InPlaceRead(HEAD + 5_000, 0, 9_999), False, id="more than half as much in vain"),
        pytest.param(InPlaceRead(HEAD + 5_000, 0, 10_000), True, id="half as much in vain"),
        pytest.param(InPlaceRead(HEAD + 8_001, 0, 50_000), False, id="too wide a gap"),
        pytest.param(Gather(HEAD, HEAD + 90_000, (9, 9), (20, 1), 0, (9, 1), 4), True, id="a window"),
        pytest.param(Gather(HEAD, HEAD + 99_400, (9, 9), (20, 1), 0, (9, 1), 4), False, id="a long window"),
    ],
)
def test_when_a_head_comes_with_its_data(first: Request, brings: bool) -> None:
    assert brings_head(first, HEAD, REMOTE) == brings
