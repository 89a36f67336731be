"""From a box of a strided item to byte ranges: each wanted byte once, where it belongs, and no window too wide."""

from __future__ import annotations

import itertools
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardferry import requests
from shardferry.decode import ItemLayout
from shardferry.region import Region, row_major_strides
from shardferry.requests import InPlaceRead, Request, requests_for

RAW_START = 24
ITEMSIZE = 2
UNTOUCHED = 0xEE


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


@given(wanted_boxes(), st.sampled_from([2, 6, 16, 64 * 1024]), st.sampled_from([4, 10, 32, 8 * 1024 * 1024]))
def test_each_wanted_byte_goes_once_to_its_place(
    wanted: tuple[ItemLayout, Region, tuple[int, ...], int], long_run: int, max_request: int
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

    with mock.patch.multiple(requests, LONG_RUN=long_run, MAX_REQUEST=max_request):
        found = requests_for(
            layout, source_offsets=box.offsets, sizes=box.sizes, arena_offset=arena_offset, strides=strides
        )
    for request in found:
        carry_out(request, item, arena)

    assert (arena == expected).all()
    assert sum(request.nbytes for request in found) == box.numel * ITEMSIZE
    assert all(request.nbytes <= max(max_request, ITEMSIZE) for request in found if isinstance(request, InPlaceRead))


@pytest.mark.parametrize("long_run", [2, 64 * 1024])
def test_rows_of_a_row_major_item_are_one_request(long_run: int) -> None:
    layout = layout_of((8, 6), (0, 1), 0)
    with mock.patch.object(requests, "LONG_RUN", long_run):
        found = requests_for(layout, source_offsets=(2, 0), sizes=(4, 6), arena_offset=10, strides=(6, 1))
    assert found == [InPlaceRead(RAW_START + 2 * 6 * ITEMSIZE, 10, 4 * 6 * ITEMSIZE)]


def test_an_empty_box_asks_for_nothing() -> None:
    layout = layout_of((4, 6), (0, 1), 0)
    assert requests_for(layout, source_offsets=(0, 0), sizes=(4, 0), arena_offset=0, strides=(0, 1)) == []
