"""Boxes of integers, against the sets of elements that they stand for."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shardferry.region import (
    Region,
    first_overlap,
    row_major_strides,
    tile,
    uncovered,
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


@st.composite
def cut_up(draw: st.DrawFn) -> tuple[Region, list[Region]]:
    """A box, and boxes inside it: it is cut again and again; then, perhaps, one part is lost, doubled, or is another box."""
    whole = draw(st.integers(0, 3).flatmap(regions_of))
    parts = [whole] if whole.numel else []
    for _ in range(draw(st.integers(0, 6)) if parts and whole.sizes else 0):
        box = parts.pop(draw(st.integers(0, len(parts) - 1)))
        dim = draw(st.integers(0, len(box.sizes) - 1))
        size = draw(st.integers(0, box.sizes[dim]))
        half = Region(box.offsets, (*box.sizes[:dim], size, *box.sizes[dim + 1 :]))
        parts += [part for part in (half, *box.subtract(half)) if part.numel]
    spoil = draw(st.sampled_from(["no", "no", "lose", "double", "replace"])) if parts else "no"
    if spoil in ("lose", "replace"):
        parts.pop(draw(st.integers(0, len(parts) - 1)))
    if spoil == "double":
        parts.append(draw(st.sampled_from(parts)))
    other = draw(regions_of(len(whole.sizes))).intersect(whole) if spoil == "replace" else None
    return whole, draw(st.permutations(parts + ([other] if other else [])))


@given(cut_up())
def test_boxes_tile_a_box_where_they_hold_each_element_once(case: tuple[Region, list[Region]]) -> None:
    whole, boxes = case
    offsets = np.array([box.offsets for box in boxes], dtype=np.int64).reshape(len(boxes), len(whole.sizes))
    sizes = np.array([box.sizes for box in boxes], dtype=np.int64).reshape(len(boxes), len(whole.sizes))
    held = Counter(index for box in boxes for index in elements(box))
    assert tile(offsets, sizes, whole) == (held == Counter(elements(whole)))


def test_boxes_too_wide_for_their_corners_to_be_numbered_are_compared() -> None:
    whole, half = Region((0, 0), (3, 1 << 60)), 1 << 59
    sizes = np.array([[3, half], [3, half]])
    assert tile(np.array([[0, 0], [0, half]]), sizes, whole) is True
    assert tile(np.array([[0, 0], [0, half - 1]]), sizes, whole) is False


@given(shapes.filter(lambda shape: 0 not in shape))
def test_row_major_strides_count_the_elements_in_order(shape: Index) -> None:
    strides = row_major_strides(shape)
    positions = [
        sum(i * s for i, s in zip(index, strides, strict=True)) for index in itertools.product(*map(range, shape))
    ]
    assert positions == list(range(len(positions)))
