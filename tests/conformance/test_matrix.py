"""Every topology as a source, every topology as a target: all pairs are planned, a covering few are loaded for real.

A source is a network that torch itself has laid out over real ranks, saved by stock torch. A target is what is in the
memory of such ranks: weights that number their elements (tests/support/networks.py). No layout of ours is trusted.

What loaders keep in memory is a source too: all pairs are planned from the arenas of each topology, the same few are loaded.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from shardferry.checkpoint.catalog import Catalog
from shardferry.checkpoint.kept import arena_file
from shardferry.checkpoint.open import open_checkpoint
from shardferry.config import KeyPolicy, LoadRequest, ReadOptions
from shardferry.exchange.agreement import Agreement
from shardferry.layout.live import LiveLayout
from shardferry.load import LoadedShard, LoadJob, load_rank
from shardferry.plan.kept import index_of
from shardferry.plan.load_plan import PlannedTensor
from shardferry.plan.planner import plan_load
from tests.support.covering import covering_pairs, traits
from tests.support.matrix import Held, load_and_compare, save_and_describe
from tests.support.networks import STATES, STEP, numbers_of, parameters, state_of
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
    layout = without(held.layout, unsaved)
    plan = plan_load(catalog, layout, LoadRequest("optim"))
    memories = simulate(plan, catalog, whole_of)
    planned = {(tensor.fqn, tensor.name) for tensor in plan.tensors}
    assert planned >= {(fqn, name) for fqn in layout.parameters for name in ("step", *STATES)}, where
    for tensor, memory in zip(plan.tensors, memories, strict=True):
        if tensor.name in STATES:
            assert np.array_equal(memory, held.numbers[tensor.fqn]), f"{where}: {tensor.fqn} {memory}"
            assert tensor.dtype == parameters()[tensor.fqn][1]


def without(layout: LiveLayout, unsaved: frozenset[str]) -> LiveLayout:
    return dataclasses.replace(
        layout, parameters={fqn: there for fqn, there in layout.parameters.items() if fqn not in unsaved}
    )


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


@pytest.fixture(scope="module")
def kept(laid_out: dict[Topology, LaidOut], tmp_path_factory: pytest.TempPathFactory) -> dict[Topology, Catalog]:
    """What loaders of each topology keep: arenas, and the index of what is in them."""
    directory = tmp_path_factory.mktemp("kept")
    found = {}
    for topology, there in laid_out.items():
        path = directory / topology.name
        path.mkdir()
        loaded = [load_one(there.catalog, held, topology.unsaved) for held in there.ranks]
        for rank, shard in enumerate(loaded):
            (path / arena_file(rank, 0)).write_bytes(shard.arena.as_bytes().numpy().tobytes())
        for name, content in index_of([[shard.manifest] for shard in loaded]).files().items():
            (path / name).write_bytes(content)
        found[topology] = open_checkpoint(path)
    return found


def load_one(catalog: Catalog, held: Held, unsaved: frozenset[str]) -> LoadedShard:
    """One rank's share, without the other ranks: what those take is unexpected here."""
    request = LoadRequest("optim", keys=KeyPolicy(ignore_unexpected=True))
    layout, read = without(held.layout, unsaved), ReadOptions(strategy="direct")
    return load_rank(LoadJob(catalog, layout, request, torch.device("cpu"), read), Agreement(None))


@pytest.mark.parametrize("source", TOPOLOGIES, ids=str)
def test_plans_from_memory_to_all_targets(
    laid_out: dict[Topology, LaidOut], kept: dict[Topology, Catalog], source: Topology
) -> None:
    """As from files, but with the boxes as they lie in arenas."""
    for target in TOPOLOGIES:
        for rank, held in enumerate(laid_out[target].ranks):
            check_plan(kept[source], held, source.unsaved, where=f"memory of {source} -> {target}, rank {rank}")


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda topology: topology.name)
def test_loads_from_memory(
    laid_out: dict[Topology, LaidOut], kept: dict[Topology, Catalog], source: Topology, target: Topology
) -> None:
    """Every element of the state bitwise."""
    compared: set[int] = set()
    for held in laid_out[target].ranks:
        shard = load_one(kept[source], held, source.unsaved)
        state = shard.state()
        for tensor in shard.plan.tensors:
            local = state.local_tensor(tensor).reshape(-1)
            if tensor.name in STATES:
                numbers = torch.from_numpy(held.numbers[tensor.fqn])
                expected = state_of(numbers.to(local.dtype), tensor.name)
                assert torch.equal(local, expected), f"{tensor.fqn}.{tensor.name}"
                compared.update(numbers.tolist())
            elif tensor.name == "step":
                assert local.tolist() == [STEP]
    assert compared - {0} == wanted_numbers(source.unsaved)
