"""The regions of each rank against a plain reading of the placements."""

from __future__ import annotations

import itertools
import pickle
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Partial, Placement, Replicate, Shard

from shardferry.errors import LayoutError
from shardferry.layout.from_tensor import strided_shard
from shardferry.layout.live import LiveLayout
from shardferry.layout.mesh import Mesh, parse_placement
from shardferry.layout.spec import Rule, SpecLayout, spec_of
from shardferry.layout.tensor_layout import AxisCut, flat_range, flat_slice, shard_on_mesh
from shardferry.region import Region

Index = tuple[int, ...]


def elements(region: Region) -> list[Index]:
    return list(itertools.product(*(range(o, e) for o, e in zip(region.offsets, region.ends, strict=True))))


def chunk(indices: list[int], num_ranks: int, rank: int) -> list[int]:
    """As `torch.chunk` splits: parts of the ceiling, the last ones short or empty."""
    full = -(-len(indices) // num_ranks)
    return indices[rank * full : (rank + 1) * full]


def held(shape: Index, mesh: Mesh, placements: list[Placement], world_rank: int) -> set[Index]:
    """The elements of one rank, read off the placements one axis after the other, innermost first."""
    kept = [list(range(n)) for n in shape]
    axes = list(zip(mesh.axes, placements, mesh.coordinate(world_rank), strict=True))
    for (_, size), placement, index in reversed(axes):
        if isinstance(placement, Shard):
            kept[placement.dim] = chunk(kept[placement.dim], size, index)
    return set(itertools.product(*kept))


@st.composite
def topologies(draw: st.DrawFn) -> tuple[Index, Mesh, list[Placement]]:
    shape = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=3)))
    mesh = Mesh(tuple((f"a{i}", draw(st.integers(1, 4))) for i in range(draw(st.integers(1, 3)))))
    choices: list[Placement] = [Replicate(), *(Shard(dim) for dim in range(len(shape)))]
    return shape, mesh, [draw(st.sampled_from(choices)) for _ in mesh.axes]


@given(topologies())
def test_each_rank_holds_what_the_placements_say_and_each_element_is_held(
    topology: tuple[Index, Mesh, list[Placement]],
) -> None:
    shape, mesh, placements = topology
    defaults = dict(zip(mesh.names, placements, strict=True))
    layout = SpecLayout(mesh, (), defaults)
    all_held: set[Index] = set()
    for rank in range(mesh.size):
        tensor = layout.rank(rank).parameter("w", shape)
        found = {index for box in tensor.boxes for index in elements(box.region)}
        assert found == held(shape, mesh, placements, rank)
        assert tensor.wanted_numel == len(found) == tensor.local_numel
        all_held |= found
    assert all_held == set(itertools.product(*map(range, shape)))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple), st.data())
def test_a_flat_slice_is_in_row_major_order(shape: Index, data: st.DataObject) -> None:
    order = list(itertools.product(*map(range, shape)))
    start = data.draw(st.integers(0, len(order)))
    stop = data.draw(st.integers(start, len(order)))
    layout = flat_slice(shape, start=start, stop=stop)
    local: dict[int, Index] = {}
    for box in layout.boxes:
        offset, strides = layout.destination(box)
        for index in elements(box.region):
            inside = [i - o for i, o in zip(index, box.region.offsets, strict=True)]
            local[offset + sum(i * s for i, s in zip(inside, strides, strict=True))] = index
    assert [local[place] for place in sorted(local)] == order[start:stop]
    assert sorted(local) == list(range(stop - start))


@given(st.lists(st.integers(0, 4), max_size=4).map(tuple), st.data())
def test_flat_ranges_are_the_row_major_elements_in_order(shape: Index, data: st.DataObject) -> None:
    order = list(itertools.product(*map(range, shape)))
    start = data.draw(st.integers(0, len(order)))
    stop = data.draw(st.integers(start, len(order)))
    regions = flat_range(shape, start=start, stop=stop)
    assert [index for region in regions for index in elements(region)] == order[start:stop]
    assert len(regions) <= max(1, 2 * len(shape) - 1)


def test_eight_rows_over_dp_2_and_tp_2() -> None:
    layout = SpecLayout(Mesh((("dp", 2), ("tp", 2))), (), {"dp": Shard(0), "tp": Shard(0)})
    starts = [layout.rank(rank).parameter("w", (8,)).boxes[0].region.offsets[0] for rank in range(4)]
    assert starts == [0, 4, 2, 6]  # tp splits first, as torch's _StridedShard has it


def test_the_first_rule_that_matches_decides() -> None:
    rules = (Rule("*.bias", {}), Rule("head.*", {"tp": Shard(1)}))
    layout = SpecLayout(Mesh((("tp", 2),)), rules, {"tp": Shard(0)})
    rank = layout.rank(1)
    assert rank.parameter("head.bias", (4,)).local_shape == (4,)
    assert rank.parameter("head.weight", (4, 6)).local_shape == (4, 3)
    assert rank.parameter("body.weight", (4, 6)).local_shape == (2, 6)


@pytest.mark.parametrize(
    ("text", "placement"),
    [
        ("Shard(0)", Shard(0)),
        (" Shard( dim=2 ) ", Shard(2)),
        ("Replicate", Replicate()),
        ("Replicate()", Replicate()),
    ],
)
def test_placements_are_written_as_torch_prints_them(text: str, placement: Placement) -> None:
    assert parse_placement(text) == placement


@pytest.mark.parametrize("text", ["", "Shard", "Shard(-1)", "Shard(0", "Partial(sum)", "shard(0)"])
def test_other_placements_are_refused_by_name(text: str) -> None:
    with pytest.raises(LayoutError, match="is not a placement; write"):
        parse_placement(text)


def test_placements_are_equal_by_value_and_stay_so_in_another_process() -> None:
    """Layouts are compared, are keys, and are sent to other ranks; torch's own placements must allow that."""
    placements = [Replicate(), Replicate(), Shard(0), Shard(0), Shard(1)]
    assert set(placements) == {Replicate(), Shard(0), Shard(1)}
    assert len(set(placements)) == 3
    cuts = [AxisCut(2, 1, Shard(0)), AxisCut(3, 2, Replicate()), AxisCut(2, 0, Shard(1))]
    layout = shard_on_mesh((8, 6), cuts)
    received = pickle.loads(pickle.dumps(layout))
    assert received == layout
    assert {received, layout} == {layout}
    assert received.placements == (Shard(0), Replicate(), Shard(1))
    assert shard_on_mesh((8, 6), [*cuts[:2], AxisCut(2, 0, Replicate())]) != layout


@pytest.mark.parametrize("placement", [Partial(), strided_shard(0, 2)], ids=repr)
def test_other_placements_of_torch_are_refused_by_name(placement: Placement) -> None:
    """In torch 2.9 a _StridedShard is a Shard, and equal to one; the order of the axes must not be lost by that."""
    with pytest.raises(LayoutError, match=rf"placement {re.escape(repr(placement))} can't be loaded; only Shard and"):
        shard_on_mesh((8,), [AxisCut(2, 0, placement)])
    with pytest.raises(LayoutError, match=r"w: placement .* can't be loaded; only Shard and Replicate"):
        SpecLayout(Mesh((("dp", 2),)), (), {"dp": placement}).rank(0).parameter("w", (8,))


def test_the_layout_of_a_spec_tells_the_spec_and_that_of_a_live_model_has_none() -> None:
    spec = SpecLayout(Mesh((("dp", 2),)), (), {"dp": Shard(0)})
    assert spec_of(spec.rank(1)) is spec
    assert spec_of(LiveLayout(1, 2, {})) is None


def test_a_dimension_that_is_not_there_is_refused_with_both_numbers() -> None:
    with pytest.raises(LayoutError, match=r"Shard\(5\) asks for dimension 5 of a tensor with 2 dimensions \(4, 6\)"):
        shard_on_mesh((4, 6), [AxisCut(2, 0, Shard(5))])
    with pytest.raises(LayoutError, match="of a scalar; leave it replicated"):
        shard_on_mesh((), [AxisCut(2, 0, Shard(0))])


TP = Mesh((("dp", 2), ("tp", 2)))


def test_a_default_applies_where_the_tensor_has_the_dimension() -> None:
    rank = SpecLayout(TP, (Rule("head.*", {"tp": Shard(0)}),), {"dp": Shard(0), "tp": Shard(1)}).rank(3)
    for layout_of in (rank.parameter, rank.weight):
        assert layout_of("body.weight", (4, 6)).placements == (Shard(0), Shard(1))
        bias = layout_of("body.bias", (4,))
        assert (bias.placements, bias.local_shape) == ((Shard(0), Replicate()), (2,))
        scalar = layout_of("body.scale", ())
        assert (scalar.placements, scalar.wanted_numel) == ((Replicate(), Replicate()), 1)
        assert layout_of("head.scale", ()).placements == (Replicate(), Replicate())


@pytest.mark.parametrize(
    ("rule", "shape", "message"),
    [
        pytest.param(Rule("body.bias", {"tp": Shard(1)}), (4,), r"Shard\(1\) asks for dimension 1", id="name"),
        pytest.param(Rule("*.bias", {"tp": Shard(1)}), (4,), r"Shard\(1\) asks for dimension 1", id="glob"),
        pytest.param(Rule("body.bias", {"tp": Shard(0)}), (), r"Shard\(0\) of a scalar", id="scalar"),
    ],
)
def test_a_rule_that_does_not_fit_stays_an_error(rule: Rule, shape: Index, message: str) -> None:
    rank = SpecLayout(TP, (rule,), {"tp": Shard(0)}).rank(0)
    for layout_of in (rank.parameter, rank.weight):
        with pytest.raises(LayoutError, match=rf"body\.bias: {message}"):
            layout_of("body.bias", shape)
