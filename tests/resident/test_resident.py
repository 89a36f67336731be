"""State that one job loads and others attach to, in the same topology or another one, without storage."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

import shardferry
from shardferry.actors.resident.kept import drop, find
from shardferry.actors.resident.reread import handle_of
from shardferry.errors import ArenaError, CheckpointNotFound, HandoffError, SpecError, StorageError
from shardferry.pipeline import OptimizerLoadStage
from shardferry.schemas import StageConfig
from tests.support.commands import REPOSITORY, Command
from tests.support.leftovers import nothing_held
from tests.support.models import SHAPES, STATES, STEP
from tests.support.oracle import full_tensor
from tests.support.trainers import never_stepped

pytestmark = pytest.mark.usefixtures("cluster")

NUM_ELEMENTS = 2 * sum(torch.Size(shape).numel() for shape in SHAPES.values())
NAME = "run-7"


def stage(location: str | Path | None, world_size: int = 0, **sections: Any) -> OptimizerLoadStage:
    topology = {"mesh": {"dp": world_size}, "default": {"dp": "Shard(0)"}} if world_size else None
    checkpoint = {} if location is None else {"location": str(location)}
    values = {"checkpoint": checkpoint, "topology": topology, **sections}
    return OptimizerLoadStage(StageConfig.model_validate(values))


def compared(handle: shardferry.ShardHandle) -> int:
    """Every element of a shard against the oracle; returns how many."""
    count = 0
    with handle.open() as shard:
        state = shard.state_dict()["state"]
        for fqn, shape in SHAPES.items():
            for name in STATES:
                full = full_tensor(fqn, name, shape)
                for whole, local in shard.regions(fqn, name):
                    expected = full[tuple(slice(o, e) for o, e in zip(whole.offsets, whole.ends, strict=True))]
                    found = state[fqn][name][tuple(slice(o, e) for o, e in zip(local.offsets, local.ends, strict=True))]
                    assert torch.equal(found, expected), f"{fqn}.{name}"
                    count += found.numel()
    return count


@pytest.fixture(scope="module")
def gpus_of_loaders(cluster: None, saved_by: dict[int, Path]) -> Iterator[str]:
    """What a job has told that has loaded, kept and ended."""
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "tests.resident.keep_and_leave", address, str(saved_by[4]), NAME]
    with nothing_held():
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr[-3000:]
        yield done.stdout.strip()
        drop(NAME)
        assert shardferry.kept() == []


def test_another_job_attaches(gpus_of_loaders: str, saved_by: dict[int, Path]) -> None:
    assert gpus_of_loaders == "[[], []]"
    handles = [shardferry.attach(NAME, rank, location=str(saved_by[4])) for rank in range(2)]
    assert [handle.transport for handle in handles] == ["shared_memory"] * 2
    with handles[0].open() as shard:  # nobody's writes reach what others attach to
        for state in shard.state_dict()["state"].values():
            for tensor in state.values():
                tensor.fill_(-1.0)
    assert sum(map(compared, handles)) == NUM_ELEMENTS
    (state,) = shardferry.kept()
    assert (state.name, state.location, state.world_size, state.lost_ranks) == (NAME, str(saved_by[4]), 2, ())
    assert sum(state.bytes_per_node.values()) >= 4 * NUM_ELEMENTS
    assert 3000 < state.left_s <= 3600
    assert (state.optimizer_key, state.model_key, state.selection, state.step) == ("optim", "model", {}, STEP)
    assert len(bytes.fromhex(state.digest)) == 32


def test_what_can_not_be_attached_to(gpus_of_loaders: str) -> None:
    with pytest.raises(HandoffError, match=rf"nothing is kept under 'run-8'; there is {NAME}"):
        shardferry.attach("run-8", 0)
    with pytest.raises(HandoffError, match="keeps the state of 2 ranks; there is no rank 2"):
        shardferry.attach(NAME, 2)
    with pytest.raises(HandoffError, match=r"keeps the state of .* not of s3://bucket/other"):
        shardferry.attach(NAME, 0, location="s3://bucket/other")
    with pytest.raises(HandoffError, match=r"the state of .* with optimizer_key 'optim', not 'optimizer'"):
        shardferry.attach(NAME, 0, optimizer_key="optimizer")
    with pytest.raises(HandoffError, match=r"the state of .* with model_key 'model', not 'ema'"):
        shardferry.attach(NAME, 0, optimizer_key="optim", model_key="ema")
    with pytest.raises(CheckpointNotFound, match="nothing is kept under 'run-8'"):
        shardferry.open_checkpoint("shardferry+memory://run-8")


def test_a_guard_that_does_not_answer_is_not_taken_for_gone(gpus_of_loaders: str) -> None:
    """Its node may be very busy: "nothing is kept" would be wrong."""
    _, guard = find(NAME)
    pid = ray.get(guard.__ray_call__.remote(lambda _: os.getpid()))
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(HandoffError, match=rf"{NAME}.*: the guard of this kept state did not answer within 1 s"):
            find(NAME, answer_s=1.0)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert find(NAME)[0].name == NAME


def test_the_name_is_taken(gpus_of_loaders: str, saved_by: dict[int, Path]) -> None:
    with pytest.raises(SpecError, match=rf"handoff.keep.name: '{NAME}' is taken"):
        stage(saved_by[4], 1).submit(keep=NAME)


def test_more_than_the_nodes_memory_is_refused(saved_by: dict[int, Path]) -> None:
    keep = {"name": "large", "memory_fraction": 1e-9}
    with nothing_held():
        with pytest.raises(ArenaError, match=r"2 arena\(s\) .* handoff.keep.memory_fraction = 1e-09 allows \d+: "):
            stage(saved_by[4], 2, handoff={"keep": keep}).run()
        assert kept_as("large") is None


@pytest.mark.parametrize("world_size", [3])
def test_another_topology_from_memory(gpus_of_loaders: str, world_size: int) -> None:
    with stage(f"shardferry+memory://{NAME}", world_size).run() as result:
        assert sum(map(compared, result.handles)) == NUM_ELEMENTS
        assert result.report.location == f"shardferry+memory://{NAME}"


def test_trainers_in_another_topology_from_memory(
    gpus_of_loaders: str, trainers_with: Callable[..., list[Any]], saved_by: dict[int, Path]
) -> None:
    """Through loaders beside them, and inside them."""
    for transport in ("auto", "in_process"):
        trainers = trainers_with(never_stepped)
        stage(f"shardferry+memory://{NAME}", handoff={"transport": transport}).run(trainers)
        assert sum(ray.get([trainer.check.remote() for trainer in trainers])) == NUM_ELEMENTS


def test_commands_work_with_it(gpus_of_loaders: str, shardferry: Command, saved_by: dict[int, Path]) -> None:
    listed = json.loads(shardferry("kept", "--json").stdout)
    assert [state["name"] for state in listed["kept"]] == [NAME]
    table = shardferry("kept").stdout
    assert listed["kept"][0]["digest"][:12] in table
    inspected = json.loads(shardferry("inspect", f"shardferry+memory://{NAME}", "--json").stdout)
    assert {tensor["fqn"] for tensor in inspected["tensors"]} >= {f"optim.state.{fqn}.exp_avg" for fqn in SHAPES}
    assert inspected["problems"] == []
    found = json.loads(shardferry("diff", saved_by[4], f"shardferry+memory://{NAME}", "--values", "--json").stdout)
    assert found["num_compared"] >= len(SHAPES) * len(STATES)
    # The weights were not asked for, and the param groups are kept as one value.
    assert (found["tensors"], found["only_in_second"]) == ([], ["optim.param_groups"])
    assert all(key.startswith(("model.", "optim.param_groups.")) for key in found["only_in_first"])


def kept_as(name: str) -> Any:
    return next((state for state in shardferry.kept() if state.name == name), None)


def kill(handle: shardferry.ShardHandle) -> None:
    """Kill the process of its loader."""
    source: Any = handle.source
    os.kill(source.file.pid, signal.SIGKILL)


def test_a_loader_dies_and_another_state_takes_the_name(saved_by: dict[int, Path], tmp_path: Path) -> None:
    keep, location = {"name": "short", "ttl_s": 600, "replace": True}, tmp_path / "ckpt"
    shutil.copytree(saved_by[4], location)
    with nothing_held():
        stage(location, 2, handoff={"keep": keep}).run()
        before, guard = find("short")
        kill(shardferry.attach("short", 1))
        wait_until(lambda: kept_as("short").lost_ranks == (1,))
        words = r"the loader of rank 1 on .* has died, and its part of the state with it"
        with pytest.raises(HandoffError, match=rf"{words}.*Load that rank from {location}"):
            handle_of(dataclasses.replace(before, retries=0), guard, 1)
        with pytest.raises(StorageError, match=rf"{words}.*attach\('short', 1\)` reads it again"):
            stage("shardferry+memory://short", 1).run()

        with ThreadPoolExecutor(2) as pool:  # both wait for one loader, which reads it again
            two = list(pool.map(lambda _: shardferry.attach("short", 1), range(2)))
        assert two[0].source == two[1].source
        assert two[0].manifest.request == shardferry.attach("short", 0).manifest.request
        assert compared(two[0]) + compared(shardferry.attach("short", 0)) == NUM_ELEMENTS
        assert kept_as("short").lost_ranks == ()
        with stage("shardferry+memory://short", 1).run() as result:
            assert sum(map(compared, result.handles)) == NUM_ELEMENTS

        for path in (location / ".metadata", *location.glob("*.distcp")):
            path.touch()
        kill(two[0])
        with pytest.raises(HandoffError, match=r"its part can't be read again from .*: the checkpoint was saved again"):
            shardferry.attach("short", 1)
        shutil.rmtree(location)
        with pytest.raises(HandoffError, match=r"its part can't be read again from .*: .*no such directory"):
            shardferry.attach("short", 1)
        wait_until(lambda: kept_as("short").lost_ranks == (1,))
        assert 0 < compared(shardferry.attach("short", 0)) < NUM_ELEMENTS

        stage(saved_by[4], 1, handoff={"keep": {**keep, "ttl_s": 8}}).run()
        after, _ = find("short")
        assert after.stage != before.stage
        assert compared(shardferry.attach("short", 0)) == NUM_ELEMENTS
        wait_until(lambda: kept_as("short") is None)  # nobody attaches


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.5)
