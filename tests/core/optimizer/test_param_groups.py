"""Param groups by parameter: whatever the saver's shape, whatever the live optimizer's split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardferry.checkpoint.optimizer_state import build_param_groups
from shardferry.config import HyperparameterPolicy
from shardferry.errors import InstallError
from shardferry.optimizer.hyperparameters import group_values
from shardferry.state_dicts import KeyPath

hyperparameters = st.fixed_dictionaries(
    {"lr": st.sampled_from([0.1, 0.2]), "betas": st.sampled_from([(0.9, 0.95), (0.9, 0.99)])}
)


def hyperparameters_for(fqns: Sequence[str], saved: Sequence[dict[str, Any]]) -> Mapping[str, Any]:
    """The saved hyperparameters for parameters of one live group."""
    return group_values(fqns, saved, {}, known={"lr", "betas"}, policy=HyperparameterPolicy()).values


@st.composite
def saved_groups(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Param groups over up to twelve parameters, each in one group."""
    fqns = [f"layers.{i}.weight" for i in range(draw(st.integers(1, 12)))]
    groups: list[dict[str, Any]] = [{"params": [], **draw(hyperparameters)} for _ in range(draw(st.integers(1, 4)))]
    for fqn in fqns:
        groups[draw(st.integers(0, len(groups) - 1))]["params"].append(fqn)
    return [group for group in groups if group["params"]]


def flattened(groups: list[dict[str, Any]]) -> dict[KeyPath, Any]:
    """As torch flattens lists of dicts."""
    return {(i, name): value for i, group in enumerate(groups) for name, value in group.items()}


def by_parameter(groups: list[dict[str, Any]]) -> dict[KeyPath, Any]:
    """As ``flatten_optimizer_state_dict`` writes them."""
    return {
        (f"{fqn}.{name}",): value
        for group in groups
        for fqn in group["params"]
        for name, value in group.items()
        if name != "params"
    }


@pytest.mark.conformance(9)
@given(saved_groups())
def test_each_way_of_saving_gives_each_parameter_its_hyperparameters(groups: list[dict[str, Any]]) -> None:
    wanted = {fqn: {"lr": group["lr"], "betas": group["betas"]} for group in groups for fqn in group["params"]}
    for entries in ({(): groups}, flattened(groups), by_parameter(groups)):
        rebuilt = build_param_groups(entries)
        assert {fqn: hyperparameters_for([fqn], rebuilt) for fqn in wanted} == wanted


@given(saved_groups(), st.data())
def test_any_split_finds_its_values_or_is_refused(groups: list[dict[str, Any]], data: st.DataObject) -> None:
    owner = {fqn: group for group in groups for fqn in group["params"]}
    live = data.draw(st.lists(st.sampled_from(sorted(owner)), unique=True))
    alike = {(owner[fqn]["lr"], owner[fqn]["betas"]) for fqn in live}
    if len(alike) > 1:
        with pytest.raises(InstallError, match="one live param group joins saved groups that differ in"):
            hyperparameters_for(live, groups)
    else:
        found = hyperparameters_for(live, groups)
        assert {(found["lr"], found["betas"])} == alike if live else found == {}


def test_a_parameter_in_no_saved_group_takes_what_all_of_them_agree_on() -> None:
    assert hyperparameters_for(["a", "b"], [{"params": ["a"], "lr": 0.1}]) == {"lr": 0.1}


def test_a_parameter_in_no_saved_group_keeps_the_live_values_where_they_differ() -> None:
    groups = [{"params": ["a"], "lr": 0.1}, {"params": ["c"], "lr": 0.2}]
    found = group_values(["a", "b"], groups, {"lr": 1.0}, known={"lr"}, policy=HyperparameterPolicy())
    assert found.values == {}
    assert found.warning.startswith("b: in none of the 2 saved param groups")


def test_groups_beyond_the_tenth_keep_their_order() -> None:
    groups = [{"params": [f"p{i}"], "lr": float(i)} for i in range(12)]
    entries = dict(sorted(flattened(groups).items(), key=lambda entry: str(entry[0])))  # "10" before "2"
    assert build_param_groups(entries) == groups
