"""Boxes of integers, against the sets of elements that they stand for."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shardferry.region import (
    Region,
    first_overlap,
    flat_range,
    row_major_strides,
    uncovered,
    union_numel,
)

Index = tuple[int, ...]


def elements(region: Region) -> set[Index]:
    return set(itertools.product(*(range(o, e) for o, e in zip(region.offsets, region.ends, strict=True))))


def regions_of(ndim: int) -> st.SearchStrategy[Region]:
    return st.builds(
        Region,
        st.tuples(*[st.integers(0, 4)] * ndim),
        st.tuples(*[st.integers(0, 4)] * ndim),
    )


pairs = st.integers(0, 3).flatmap(lambda ndim: st.tuples(regions_of(ndim), regions_of(ndim)))
lists = st.integers(0, 3).flatmap(lambda ndim: st.lists(regions_of(ndim), max_size=7))
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@given(pairs)
def test_intersection_is_the_intersection_of_the_elements(pair: tuple[Region, Region]) -> None:
    one, other = pair
    common = one.intersect(other)
    assert (set() if common is None else elements(common)) == elements(one) & elements(other)


@given(pairs)
def test_subtraction_leaves_disjoint_boxes_of_the_other_elements(pair: tuple[Region, Region]) -> None:
    one, other = pair
    rest = one.subtract(other)
    assert sum(part.numel for part in rest) == len(set().union(*map(elements, rest)))
    assert set().union(*map(elements, rest)) == elements(one) - elements(other)


@given(lists, st.data())
def test_uncovered_is_what_no_box_holds(saved: list[Region], data: st.DataObject) -> None:
    ndim = len(saved[0].sizes) if saved else 2
    wanted = data.draw(regions_of(ndim))
    holes = uncovered(wanted, saved)
    assert sum(hole.numel for hole in holes) == len(set().union(*map(elements, holes)))
    assert set().union(*map(elements, holes)) == elements(wanted) - set().union(*map(elements, saved))


@given(lists)
def test_first_overlap_finds_two_boxes_that_share_an_element_wherever_there_are_two(boxes: list[Region]) -> None:
    ndim = len(boxes[0].sizes) if boxes else 1
    offsets = np.array([box.offsets for box in boxes], dtype=np.int64).reshape(len(boxes), ndim)
    sizes = np.array([box.sizes for box in boxes], dtype=np.int64).reshape(len(boxes), ndim)
    found = first_overlap(offsets, sizes)
    sharing = [
        (i, j) for i, j in itertools.combinations(range(len(boxes)), 2) if elements(boxes[i]) & elements(boxes[j])
    ]
    assert found is None if not sharing else found in sharing


@given(lists)
def test_the_union_counts_each_element_once(boxes: list[Region]) -> None:
    assert union_numel(boxes) == len(set().union(*map(elements, boxes)))


@given(shapes, st.data())
def test_flat_ranges_are_the_row_major_elements_in_order(shape: Index, data: st.DataObject) -> None:
    order = list(itertools.product(*map(range, shape)))
    start = data.draw(st.integers(0, len(order)))
    stop = data.draw(st.integers(start, len(order)))
    boxes = flat_range(shape, start=start, stop=stop)
    assert [index for box in boxes for index in sorted(elements(box))] == order[start:stop]
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


@given(shapes.filter(lambda shape: 0 not in shape))
def test_row_major_strides_count_the_elements_in_order(shape: Index) -> None:
    strides = row_major_strides(shape)
    positions = [
        sum(i * s for i, s in zip(index, strides, strict=True)) for index in itertools.product(*map(range, shape))
    ]
    assert positions == list(range(len(positions)))
