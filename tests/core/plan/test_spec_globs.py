"""Rules, ``held_by`` and defaults of a spec against the saved names: those that are about nothing saved are refused."""

from __future__ import annotations

import pickle
from collections.abc import Mapping

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.tensor import Shard

from shardferry.checkpoint.build import build_catalog
from shardferry.checkpoint.catalog import Catalog
from shardferry.checkpoint.metadata import parse_metadata
from shardferry.config import LoadRequest, Selection
from shardferry.errors import LayoutError, PlanError
from shardferry.layout.mesh import Mesh
from shardferry.layout.spec import HeldBy, Rule, SpecLayout
from shardferry.pipeline.dry_run.demand import demand_of
from shardferry.plan.planner import plan_load
from shardferry.plan.rank_layouts import LayoutsFromSpec
from shardferry.region import Region
from tests.support.catalogs import item_info

DP = Mesh((("dp", 2),))
OPTIM = {
    "optim.state.body.weight.exp_avg": (4, 6),
    "optim.state.body.weight.row_var": (4,),
    "optim.state.head.bias.exp_avg": (6,),
}
MOMENTS = {key: shape for key, shape in OPTIM.items() if key.endswith("exp_avg")}
MODEL = {"app.model.body.weight": (4, 6), "app.model.head.bias": (6,), "app.model.norm.mean": (6,)}
REQUEST = LoadRequest("optim")
WEIGHTS = LoadRequest("optim", model_key="app.model")


def saved(shapes: Mapping[str, tuple[int, ...]]) -> Catalog:
    """Each tensor in one chunk."""
    tensors, storage, paths = {}, {}, {}
    for number, (key, shape) in enumerate(shapes.items()):
        chunk = ChunkStorageMetadata(torch.Size((0,) * len(shape)), torch.Size(shape))
        tensors[key] = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size(shape), [chunk])
        storage[MetadataIndex(key, chunk.offsets)] = item_info(f"__{number}_0.distcp", shape)
        section, _, rest = key.partition(".")
        below, _, rest = rest.partition(".")
        fqn, _, name = rest.rpartition(".")
        paths[key] = (section, below, fqn, name) if section == "optim" else (section, below, rest)
    metadata = Metadata(tensors, paths, storage)
    return build_catalog([(".metadata", parse_metadata(pickle.dumps(metadata), source=".metadata"))], location="ckpt")


def spec(*rules: Rule, held_by: tuple[HeldBy, ...] = ()) -> SpecLayout:
    return SpecLayout(DP, rules, {"dp": Shard(0)}, held_by)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        pytest.param(
            spec(Rule("*.bias", {}), Rule("bdoy.*", {})),
            r"rule: 'bdoy\.\*' fits none of the 2 saved names; the nearest are body\.weight",
            id="rule",
        ),
        pytest.param(
            spec(held_by=(HeldBy("head.*", {"dp": (0,)}), HeldBy("haed.*", {"dp": (1,)}))),
            r"held_by: 'haed\.\*' fits none of the 2 saved names; the nearest are head\.bias",
            id="held_by",
        ),
        pytest.param(
            spec(Rule("*", {}, state="row_vra")),
            r"rule '\*': state: 'row_vra' fits none of the 2 state entries there; the nearest are row_var",
            id="state",
        ),
        pytest.param(
            spec(Rule("head.*", {}, state="row_*")),
            r"rule 'head\.\*': state: 'row_\*' fits none of the 1 state entries there; the nearest are exp_avg",
            id="state-of-another",
        ),
        pytest.param(
            spec(Rule("haed.*", {}, state="exp_avg")),
            r"rule: 'haed\.\*' fits none of the 2 saved names",
            id="parameter-of-state",
        ),
    ],
)
def test_what_is_about_nothing_saved_is_refused(wanted: SpecLayout, message: str) -> None:
    catalog = saved(OPTIM)
    for rank in range(2):
        with pytest.raises(PlanError, match=message):
            plan_load(catalog, wanted.rank(rank), REQUEST)
    with pytest.raises(PlanError, match=message):
        plan_load(catalog, wanted.rank(0), REQUEST, {})


def test_the_count_of_all_ranks_refuses_rules_too() -> None:
    with pytest.raises(PlanError, match=r"rule: 'bdoy\.\*' fits none"):
        demand_of(saved(OPTIM), spec(Rule("bdoy.*", {})), REQUEST)


def test_a_rule_may_be_about_what_is_not_selected_or_matched_before() -> None:
    wanted = spec(Rule("head.*", {}), Rule("head.bias", {}), Rule("body.*", {}, state="row_*"))
    selected = LoadRequest("optim", selection=Selection.of({}, ["head.*"], []))
    assert plan_load(saved(OPTIM), wanted.rank(0), selected).fqns == ("head.bias",)


def test_globs_are_over_the_wanted_names() -> None:
    renamed = LoadRequest("optim", selection=Selection.of({"body.*": "trunk.*"}, [], []))
    plan_load(saved(OPTIM), spec(Rule("trunk.*", {}), held_by=(HeldBy("trunk.*", {"dp": (0,)}),)).rank(0), renamed)
    with pytest.raises(PlanError, match=r"rule: 'body\.\*' fits none of the 2 saved names; the nearest are"):
        plan_load(saved(OPTIM), spec(Rule("body.*", {})).rank(0), renamed)


def test_a_rule_may_be_about_a_buffer_below_a_nested_model_key() -> None:
    plan = plan_load(saved({**OPTIM, **MODEL}), spec(Rule("norm.mean", {})).rank(0), WEIGHTS)
    assert "norm.mean" in {tensor.fqn for tensor in plan.tensors}


def test_rules_for_state_stay_in_a_load_of_the_weights_alone() -> None:
    weights = LoadRequest(None, model_key="app.model")
    plan_load(saved(MODEL), spec(Rule("body.*", {}, state="row_*")).rank(0), weights)
    with pytest.raises(PlanError, match="rule: 'bdoy"):
        plan_load(saved(MODEL), spec(Rule("bdoy.*", {}, state="row_*")).rank(0), weights)


@pytest.mark.parametrize("dim", [1, 5])
def test_a_default_for_a_dimension_that_no_tensor_has(dim: int) -> None:
    """Vectors beside matrices replicate; a dimension that not even matrices have is mistyped."""
    wanted = SpecLayout(DP, (), {"dp": Shard(dim)}).rank(1)
    if dim == 1:
        plan = plan_load(saved(MOMENTS), wanted, REQUEST)
        assert {t.key: t.layout.local_shape for t in plan.tensors} == {
            "optim.state.body.weight.exp_avg": (4, 3),
            "optim.state.head.bias.exp_avg": (6,),
        }
        return
    with pytest.raises(LayoutError, match=r"^body\.weight: Shard\(5\) asks for dimension 5 of a tensor with 2"):
        plan_load(saved(MOMENTS), wanted, REQUEST)


def test_all_ranks_agree_on_where_an_adapted_default_is_held() -> None:
    spec = SpecLayout(DP, (), {"dp": Shard(1)})
    plans = [plan_load(saved(MOMENTS), spec.rank(rank), REQUEST) for rank in range(2)]
    layouts = LayoutsFromSpec(spec, range(2))
    for tensor in plans[0].tensors:
        whole = Region.whole(tensor.layout.global_shape)
        expected = [next(t.layout for t in plan.tensors if t.key == tensor.key) for plan in plans]
        found = layouts.holders(tensor, whole)
        assert [rank for rank, _ in found] == [0, 1]
        assert [layout.boxes for _, layout in found] == [layout.boxes for layout in expected]
    demand = demand_of(saved(MOMENTS), spec, REQUEST)
    assert demand.needed.tolist() == [plan.bytes_needed for plan in plans]
