"""Where loaders run, and what they leave to others, on a cluster of several nodes; see several_nodes.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.commands import REPOSITORY
from tests.support.leftovers import nothing_left
from tests.support.models import SHAPES

NUM_ELEMENTS = sum(torch.Size(shape).numel() for shape in SHAPES.values())


@pytest.fixture(scope="module")
def told(quick_workers: None, saved_by: dict[int, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each situation told. No process and no shared file is left."""
    command = [
        sys.executable,
        "-m",
        "tests.support.forked_workers",
        "run",
        "tests.pipeline.several_nodes",
        str(saved_by[4]),
        str(tmp_path_factory.mktemp("nodes")),
    ]
    with nothing_left():
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Unhandled error" not in done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert {name: situation["held"] for name, situation in found.items()} == {name: {} for name in found}
    return {name: situation["told"] for name, situation in found.items()}


def test_trainers_that_hold_all_gpus_are_served_by_the_default_spec(told: dict[str, Any]) -> None:
    assert told["trainers_hold_all_gpus"] == {
        "free": 0,
        "transports": ["shared_memory"],  # on two nodes: each loader is beside its trainer
        "gpus": [[], [], [], []],
        "elements": 2 * NUM_ELEMENTS,
        "in_process": ["in_process"],
        "elements_in_process": 2 * NUM_ELEMENTS,
    }


def test_a_placement_group_of_the_users_own(told: dict[str, Any]) -> None:
    """Loaders take a fraction of each bundle, and downstream actors the rest of it."""
    assert told["users_placement_group"] == {
        "beside": [True, True],
        "elements": NUM_ELEMENTS,
        "gpus_outside_of_it": 2.0,
    }


def test_disks_of_their_own(told: dict[str, Any]) -> None:
    """The driver's node has the metadata alone; each of two others has half of the files."""
    found = told["disks_of_their_own"]
    name, message = found["direct"]
    assert name == "MissingFile"
    assert "__0_0.distcp: the file is missing" in message
    assert found["strategy"] == ["cooperative", "cooperative"]
    assert found["elements"] == found["elements_of_trainers"] == 2 * NUM_ELEMENTS
    assert found["unique"][0] == found["unique"][1] > 4 * 2 * NUM_ELEMENTS


def test_labels(told: dict[str, Any]) -> None:
    assert told["labels"] == {"nodes": 1, "beside": True, "transports": ["object_store"]}


def test_transports_that_ask_the_loader_reach_another_node(told: dict[str, Any]) -> None:
    assert {name: sum(elements) for name, elements in told["between_nodes"].items()} == {
        "collective": NUM_ELEMENTS,
        "nixl": NUM_ELEMENTS,
    }


def test_what_no_node_has_is_refused_at_once(told: dict[str, Any]) -> None:
    no_room = told["no_room"]
    assert [(name, at_once) for name, _, at_once in no_room.values()] == [("SpecError", True)] * 3
    for placement in ("STRICT_PACK", "STRICT_SPREAD"):
        message = no_room[placement][1]
        assert f"actors.placement: {placement} has places for 2 of 4 ranks; each needs 1 GPU, 1 CPU" in message
        assert "2 GPU, 4 CPU" in message
        assert "set actors.placement: PACK" in message
    assert "9 ranks need 9 GPUs, the cluster has 4" in no_room["PACK"][1]


def test_what_is_taken_is_told_by_node(told: dict[str, Any]) -> None:
    name, message = told["all_is_taken"]
    assert name == "RankError"
    assert "within timeouts.start_s = 4 s; each rank needs 1 GPU, 1 CPU (actors.placement: PACK)" in message
    assert "has 1 GPU, 4 CPU free" in message
    assert "has 0 GPU, 8 CPU free" in message


def test_a_node_that_dies_before_the_hand_over(told: dict[str, Any]) -> None:
    found = told["node_dies_before_the_hand_over"]
    assert ["opened", 0] in found or ["opened", 1] in found
    (lost,) = [entry for entry in found if entry[0] != "opened"]
    name, message, is_victim, seconds = lost
    assert (name, is_victim) == ("HandoffError", True)
    assert "are lost, as the node or the process that submitted the stage has died; load again" in message
    assert seconds < 60
