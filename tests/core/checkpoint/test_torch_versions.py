"""Checkpoints that other torch versions wrote (tests/data): opened, inspected, loaded, bit for bit what the oracle says."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

import shardferry
from shardferry.pipeline.inspect import inspect_report
from tests.support.models import OTHER, STATES, STEP, Model, adamw, check_groups, check_state, fsdp2
from tests.support.ranks import RankPool

pytestmark = pytest.mark.conformance(17)

DATA = Path(__file__).resolve().parents[2] / "data"
SHAPES = {"first.weight": (6, 4), "second.weight": (3, 6), "second.bias": (3,)}
NUM_ELEMENTS = 2 * (6 * 4 + 3 * 6 + 3)

# What stands in tests/data, by version: a checkpoint that is no longer found is a failure, not one test fewer.
KINDS = {
    "2.1.2": ("alone", "sharded"),  # before flatten_optimizer_state_dict
    "2.3.1": ("alone", "sharded"),
    "2.4.1": ("alone", "flattened", "sharded"),
    "2.7.1": ("alone", "flattened", "sharded"),
    "2.9.1": ("alone", "flattened", "sharded"),
    "2.14.1": ("alone", "flattened", "sharded"),
    "2.15.0": ("alone", "flattened", "sharded"),
}
CHECKPOINTS = [f"{version}/{kind}" for version, kinds in KINDS.items() for kind in kinds]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints by ``<version>/<kind>``."""
    directory = tmp_path_factory.mktemp("torches")
    for archive in DATA.glob("torch-*.tar.xz"):
        version = archive.name.removeprefix("torch-").removesuffix(".tar.xz")
        with tarfile.open(archive) as files:
            files.extractall(directory / version, filter="data")
    return directory


def test_no_checkpoint_is_forgotten(unpacked: Path) -> None:
    found = {path.relative_to(unpacked) for path in unpacked.glob("*/*")}
    assert sorted(map(str, found)) == sorted(CHECKPOINTS)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_opened_and_inspected(unpacked: Path, name: str) -> None:
    catalog = shardferry.open_checkpoint(unpacked / name)
    report = json.loads(inspect_report(catalog).model_dump_json())
    assert report["problems"] == []
    assert report["top_level_keys"] == ["optim"]
    cut = {tensor["fqn"]: tensor["num_chunks"] for tensor in report["tensors"] if "exp_avg" in tensor["fqn"]}
    chunks = 2 if name.endswith("sharded") else 1
    assert cut == {f"optim.state.{fqn}.{state}": chunks for fqn in SHAPES for state in STATES}


def load_plain(path: str) -> int:
    model = Model(SHAPES)
    optimizer = adamw(model, OTHER)
    shardferry.load_optimizer_state(model, optimizer, path)
    check_groups(optimizer)
    assert all(float(state["step"]) == STEP for state in optimizer.state.values())
    return check_state(model, optimizer)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_loaded_into_a_plain_model(unpacked: Path, name: str) -> None:
    assert load_plain(str(unpacked / name)) == NUM_ELEMENTS


def load_each_on_fsdp2(directory: str) -> dict[str, int]:
    """One process group for all of them: forming one takes longer than a load."""
    compared = {}
    for name in CHECKPOINTS:
        model = fsdp2(Model(SHAPES))
        optimizer = adamw(model, OTHER)
        shardferry.load_optimizer_state(model, optimizer, f"{directory}/{name}")
        check_groups(optimizer)
        compared[name] = check_state(model, optimizer)
    return compared


def test_loaded_on_three_ranks(ranks: RankPool, unpacked: Path) -> None:
    by_rank = ranks.run(3, load_each_on_fsdp2, str(unpacked))
    for name in CHECKPOINTS:
        assert sum(compared[name] for compared in by_rank) == NUM_ELEMENTS, name
