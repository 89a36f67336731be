"""Every topology as a source, every topology as a target: all pairs are planned, a covering few are loaded for real.

A source is a network that torch itself has laid out over real ranks, saved by stock torch. A target is what is in the
memory of such ranks: weights that number their elements (tests/support/networks.py). No layout of ours is trusted.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from shardferry.checkpoint.catalog import Catalog
from shardferry.checkpoint.open import open_checkpoint
from shardferry.config import LoadRequest
from shardferry.plan.load_plan import PlannedTensor
from shardferry.plan.planner import plan_load
from tests.support.covering import covering_pairs, traits
from tests.support.matrix import Held, load_and_compare, save_and_describe
from tests.support.networks import STATES, numbers_of, parameters
from tests.support.ranks import RankPool
from tests.support.simulation import simulate
from tests.support.topologies import TOPOLOGIES, Topology

PAIRS = covering_pairs(TOPOLOGIES)

pytestmark = [
    pytest.mark.conformance(1),
    pytest.mark.conformance(3),
    pytest.mark.conformance(4),
    pytest.mark.conformance(5),
    pytest.mark.conformance(6),
]


@dataclass(frozen=True)
class LaidOut:
    """A topology's checkpoint, and what each of its ranks holds."""

    path: Path
    catalog: Catalog
    ranks: list[Held]


@pytest.fixture(scope="module")
def laid_out(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[Topology, LaidOut]:
    """All topologies, each once on real ranks."""
    directory = tmp_path_factory.mktemp("topologies")
    found = {}
    for topology in TOPOLOGIES:
        path = directory / topology.name
        held = ranks.run(topology.world_size, save_and_describe, topology, str(path))
        found[topology] = LaidOut(path, open_checkpoint(str(path)), held)
    return found


def test_all_parameters_are_laid_out(laid_out: dict[Topology, LaidOut]) -> None:
    """The ranks of a topology together hold every element: the other tests compare with something."""
    for topology, there in laid_out.items():
        held = {int(number) for rank in there.ranks for numbers in rank.numbers.values() for number in numbers}
        assert held - {0} == wanted_numbers(frozenset()), topology


@pytest.mark.parametrize("source", TOPOLOGIES, ids=str)
def test_plans_to_all_targets(laid_out: dict[Topology, LaidOut], source: Topology) -> None:
    """Each element in a target's memory comes from the one place where the source's checkpoint has it."""
    for target in TOPOLOGIES:
        for rank, held in enumerate(laid_out[target].ranks):
            check_plan(laid_out[source].catalog, held, source.unsaved, where=f"{source} -> {target}, rank {rank}")


def check_plan(catalog: Catalog, held: Held, unsaved: frozenset[str], *, where: str) -> None:
    layouts = {fqn: layout for fqn, layout in held.layout.parameters.items() if fqn not in unsaved}
    plan = plan_load(catalog, dataclasses.replace(held.layout, parameters=layouts), LoadRequest("optim"))
    memories = simulate(plan, catalog, whole_of)
    planned = {(tensor.fqn, tensor.name) for tensor in plan.tensors}
    assert planned >= {(fqn, name) for fqn in layouts for name in ("step", *STATES)}, where
    for tensor, memory in zip(plan.tensors, memories, strict=True):
        if tensor.name in STATES:
            assert np.array_equal(memory, held.numbers[tensor.fqn]), f"{where}: {tensor.fqn} {memory}"
            assert tensor.dtype == parameters()[tensor.fqn][1]


def whole_of(tensor: PlannedTensor) -> np.ndarray:
    return numbers_of(tensor.fqn).numpy() if tensor.name in STATES else np.zeros(tensor.layout.global_shape, np.int64)


def wanted_numbers(unsaved: frozenset[str]) -> set[int]:
    return {int(number) for fqn in parameters() if fqn not in unsaved for number in numbers_of(fqn).view(-1)}


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda topology: topology.name)
def test_loads(ranks: RankPool, laid_out: dict[Topology, LaidOut], source: Topology, target: Topology) -> None:
    """Real ranks, real files: every element of the state bitwise, and the hyperparameters."""
    compared = ranks.run(target.world_size, load_and_compare, target, str(laid_out[source].path), source.unsaved)
    assert set.union(*compared) == wanted_numbers(source.unsaved)


def test_the_loaded_pairs_cover() -> None:
    """Each topology is loaded from and into at least twice; each way to cut is turned into each other one."""
    shown = [trait for pair in PAIRS for trait in traits(*pair)]
    kinds = {topology.cuts for topology in TOPOLOGIES}
    for topology in TOPOLOGIES:
        assert shown.count(("source", topology.name)) >= 2
        assert shown.count(("target", topology.name)) >= 2
    assert {trait[1:] for trait in shown if trait[0] == "cuts"} == {(one, other) for one in kinds for other in kinds}
    assert {("shrink", "transpose"), ("grow", "transpose"), ("shrink", "keep"), ("grow", "keep")} <= set(shown)
