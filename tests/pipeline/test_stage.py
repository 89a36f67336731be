"""The stage on a real Ray with logical GPUs: loading, both deliveries, composition, pinning."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from shardferry import ShardHandle
from shardferry.actors.progress import Progress
from shardferry.errors import HandoffError, InstallError, LayoutError, PlanError, RankError, SpecError
from shardferry.pipeline import Loading, OptimizerLoadStage
from shardferry.schemas import StageConfig
from shardferry.schemas.stage_report import StageReport
from tests.support.leftovers import arena_holders
from tests.support.models import SHAPES, STATES, STEP, Model, adamw, fsdp2
from tests.support.oracle import full_tensor
from tests.support.trainers import Fsdp2Trainer, Target, never_stepped

pytestmark = pytest.mark.usefixtures("cluster")

NUM_ELEMENTS = 2 * sum(torch.Size(shape).numel() for shape in SHAPES.values())


def config(path: Path | None, world_size: int = 2, **sections: Any) -> StageConfig:
    topology = {
        "mesh": {"dp": world_size},
        "default": {"dp": "Shard(0)"},
    }
    checkpoint = {} if path is None else {"location": str(path)}
    return StageConfig.model_validate({"checkpoint": checkpoint, "topology": topology, **sections})


@pytest.fixture
def four_saved(saved_by: dict[int, Path]) -> Path:
    return saved_by[4]


@pytest.fixture(autouse=True)
def _gpus_are_given_back() -> Iterator[None]:
    yield
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if ray.available_resources().get("GPU") == 4:
            return
        ray.wait([_tick.remote()], timeout=1)
    pytest.fail(f"GPUs still taken: {ray.available_resources()}")


@ray.remote(num_cpus=0)
def _tick() -> None:
    """Something to wait for while Ray cleans up."""


def check_shard(handle: ShardHandle) -> int:
    """Every element of a shard against the oracle, by the regions that the shard claims; returns how many."""
    compared = 0
    with handle.open() as shard:
        state = shard.state_dict()["state"]
        for fqn, shape in SHAPES.items():
            assert float(state[fqn]["step"]) == STEP
            for name in STATES:
                full = full_tensor(fqn, name, shape)
                assert shard.global_shape(fqn, name) == shape
                for whole, local in shard.regions(fqn, name):
                    expected = full[tuple(slice(o, e) for o, e in zip(whole.offsets, whole.ends, strict=True))]
                    found = state[fqn][name][tuple(slice(o, e) for o, e in zip(local.offsets, local.ends, strict=True))]
                    assert torch.equal(found, expected), f"{fqn}.{name}"
                    compared += found.numel()
    return compared


@pytest.mark.parametrize("transport", ["auto", "object_store", "collective", "nixl"])
def test_run_delivers_to_trainers(four_saved: Path, trainers_with: Callable[..., list[Any]], transport: str) -> None:
    trainers = trainers_with(never_stepped)
    stage = OptimizerLoadStage(
        StageConfig.model_validate({"checkpoint": {"location": str(four_saved)}, "handoff": {"transport": transport}})
    )
    shown: list[list[Progress]] = []
    report = stage.run(trainers, on_progress=shown.append).report
    assert [(seen.bytes_done, seen.bytes_total) for seen in shown[-1]] == [
        (r.bytes_needed, r.bytes_needed) for r in report.ranks
    ]
    assert sum(ray.get([trainer.check.remote() for trainer in trainers])) == NUM_ELEMENTS
    expected = "shared_memory" if transport == "auto" else transport
    assert [rank.transport for rank in report.ranks] == [expected] * 2
    assert report.world_size == 2
    of_ranks = {"join", "values", "plan", "allocate", "agree", "read", "install"}
    assert set(report.phases) == {"catalog", "start", *of_ranks, "handoff"}
    assert all(set(rank.phases) == of_ranks for rank in report.ranks)
    assert report.phases["install"] <= report.phases["handoff"]
    assert report.storage_bytes_read == sum(rank.bytes_read for rank in report.ranks)
    assert report.read_amplification == report.storage_bytes_read / report.unique_bytes_needed
    assert report.lower_bound_s > 0


@ray.remote(num_cpus=0)
def newest(path: str) -> str:
    return path


@ray.remote(num_cpus=0)
def wait_elsewhere(loading: list[Loading]) -> int:
    loading[0].wait()
    return len(loading[0].refs)


@dataclass(frozen=True)
class Loaded:
    """What a load on four ranks told, from an upstream task's location."""

    num_waited_for_elsewhere: int
    world_ranks: list[int]
    num_elements: int  # compared with the oracle
    progress: list[Progress]
    report: StageReport


@pytest.fixture(scope="module")
def loaded(cluster: None, saved_by: dict[int, Path]) -> Loaded:
    loading = OptimizerLoadStage(config(None, 4)).submit(location=newest.remote(str(saved_by[4])))
    elsewhere = ray.get(wait_elsewhere.remote([loading]))
    handles = ray.get(loading.refs)
    found = Loaded(
        elsewhere,
        [handle.world_rank for handle in handles],
        sum(map(check_shard, handles)),
        loading.progress(),
        loading.result().report,
    )
    loading.close()
    return found


@pytest.mark.conformance(18)
def test_loaders_are_pinned_to_gpus_of_their_own(loaded: Loaded) -> None:
    assert sorted(gpu for rank in loaded.report.ranks for gpu in rank.gpu_ids) == ["0", "1", "2", "3"]


def test_submit_gives_one_ref_a_rank(loaded: Loaded) -> None:
    assert loaded.world_ranks == list(range(4))
    assert loaded.num_elements == NUM_ELEMENTS


def test_location_of_an_upstream_task_and_waiting_elsewhere(loaded: Loaded, four_saved: Path) -> None:
    assert loaded.num_waited_for_elsewhere == 4
    assert loaded.report.location == str(four_saved)


def test_progress_reaches_the_needed_bytes(loaded: Loaded) -> None:
    assert [rank.bytes_done for rank in loaded.progress] == [rank.bytes_needed for rank in loaded.report.ranks]


def test_stages_hold_parameters_of_their_own_and_weights_come_along(four_saved: Path) -> None:
    """Two pipeline stages of two data-parallel ranks, under new names, with the model's weights."""
    spec = {
        "checkpoint": {
            "location": str(four_saved),
            "model_key": "model",
            "rename": {"even.*": "first.*"},
            "exclude": ["one.*", "cube.*"],
        },
        "topology": {
            "mesh": {"pp": 2, "dp": 2},
            "default": {"dp": "Shard(0)"},
            "held_by": [{"match": "first.*", "ranks": {"pp": [0]}}, {"match": "*", "ranks": {"pp": [1]}}],
        },
    }
    with OptimizerLoadStage(StageConfig.model_validate(spec)).run() as result:
        shards = [handle.open() for handle in result.handles]
    weights = [shard.model_state_dict() for shard in shards]
    first, last = {"first.weight", "first.bias"}, {"five.weight", "seven.weight", "thirty.weight"}
    assert [set(shard.state_dict()["state"]) for shard in shards] == [first, first, last, last]
    assert [set(found) for found in weights] == [first, first, last, last]
    for fqn in ("even.weight", "seven.weight"):
        name = "first.weight" if fqn == "even.weight" else fqn
        one, other = shards[:2] if name in first else shards[2:]
        state = [shard.state_dict()["state"][name]["exp_avg"] for shard in (one, other)]
        assert torch.equal(torch.cat(state), full_tensor(fqn, "exp_avg", SHAPES[fqn]))
        both = [shard.model_state_dict()[name] for shard in (one, other)]
        assert torch.equal(torch.cat(both), full_tensor(fqn, "weight", SHAPES[fqn]))
    groups = [group["params"] for group in shards[0].state_dict()["param_groups"]]
    assert groups == [["first.weight"], ["first.bias"]]


def test_what_does_not_fit_is_reported_where_it_is_allowed(
    four_saved: Path, trainers_with: Callable[..., list[Any]]
) -> None:
    checkpoint = {"location": str(four_saved), "rename": {"five.*": "six.*"}}
    trainers = trainers_with(never_stepped)
    with pytest.raises(PlanError, match=r"five\.weight: .* has no state for this parameter .* nearest saved names"):
        OptimizerLoadStage(StageConfig.model_validate({"checkpoint": checkpoint})).run(trainers)
    lenient = {**checkpoint, "keys": ["allow_missing", "ignore_unexpected"]}
    report = OptimizerLoadStage(StageConfig.model_validate({"checkpoint": lenient})).run(trainers).report
    assert (report.missing, report.unexpected) == (["five.weight"], ["six.weight"])


def test_refs_of_a_forgotten_stage_are_kept_and_its_gpus_given_back(four_saved: Path) -> None:
    refs = OptimizerLoadStage(config(four_saved, 1, handoff={"transport": "object_store"})).submit().refs
    assert sum(map(check_shard, ray.get(refs))) == NUM_ELEMENTS


def take(trainer: Fsdp2Trainer, handle: ShardHandle) -> int:
    """Open the shard and keep a tensor of it."""
    with handle.open() as shard:
        trainer.kept = shard.state_dict()["state"]["seven.weight"]["exp_avg"]
    return os.getpid()


def is_still_right(trainer: Fsdp2Trainer) -> bool:
    return torch.equal(trainer.kept, full_tensor("seven.weight", "exp_avg", (7, 11)))


def spoil(trainer: Fsdp2Trainer) -> None:
    trainer.kept.fill_(-1.0)


def forget(trainer: Fsdp2Trainer) -> None:
    """Drop all loaded state, that of earlier tests too."""
    del trainer.kept
    trainer.begin(never_stepped)
    gc.collect()


def test_a_trainers_memory_is_its_own_and_outlives_the_loaders(four_saved: Path, two_trainers: list[Any]) -> None:
    """But a shard whose loader has gone can't be opened any more."""
    one, other = two_trainers
    loading = OptimizerLoadStage(config(four_saved, 1, handoff={"transport": "shared_memory"})).submit()
    (handle,) = ray.get(loading.refs)
    assert check_shard(handle) == NUM_ELEMENTS
    pids = ray.get([trainer.do.remote(take, loading.refs[0]) for trainer in (one, other)])
    ray.get(one.do.remote(spoil))
    assert ray.get(other.do.remote(is_still_right))
    loading.result()
    loading.close()
    assert _gone(handle.source.file.pid)
    assert ray.get(other.do.remote(is_still_right))
    with pytest.raises(HandoffError, match=r"has ended before the shard was opened; keep the stage's result"):
        handle.open()
    ray.get([trainer.do.remote(forget) for trainer in (one, other)])
    assert all(map(_gone, pids))


def _gone(pid: int) -> bool:
    """Whether a process holds no arena, at last."""
    for _ in range(50):
        if pid not in arena_holders():
            return True
        ray.wait([_tick.remote()], timeout=1)
    return False


def test_a_bad_location_of_an_upstream_task_is_the_loads_error(tmp_path: Path) -> None:
    loading = OptimizerLoadStage(config(None, 1)).submit(location=newest.remote(str(tmp_path / "nowhere")))
    with pytest.raises(FileNotFoundError, match="no such directory"):
        loading.wait()


def test_more_ranks_than_gpus(four_saved: Path) -> None:
    with pytest.raises(SpecError, match=r"6 ranks need 6 GPUs, the cluster has 4"):
        OptimizerLoadStage(config(four_saved, 6)).submit()


def test_cluster_that_never_grows_ends_at_the_deadline(four_saved: Path) -> None:
    stage = OptimizerLoadStage(
        config(four_saved, 6, actors={"autoscaling": True}, timeouts={"start_s": 3, "load_s": 9, "handoff_s": 9})
    )
    with pytest.raises(RankError, match=r"within timeouts.start_s = 3 s; each rank needs 1 GPU, 1 CPU"):
        stage.run()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        pytest.param(
            {"checkpoint": {"optimizer_key": "opt"}}, PlanError, "top-level keys are 'model', 'optim'", id="key"
        ),
        pytest.param(
            {"topology": {"mesh": {"dp": 2}, "default": {"dp": "Shard(5)"}}}, LayoutError, "dimension 5", id="dim"
        ),
        pytest.param({"topology": None}, SpecError, "topology: missing", id="topology"),
    ],
)
def test_refused_before_any_actor_starts(
    four_saved: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    values = config(four_saved).model_dump(mode="json")
    for section, value in changes.items():
        values[section] = value if value is None else {**(values[section] or {}), **value}
    with pytest.raises(error, match=message):
        OptimizerLoadStage(StageConfig.model_validate(values)).submit()
    assert ray.available_resources()["GPU"] == 4


def two_parts() -> Target:
    """Two model parts, each with an optimizer of its own, and without one parameter."""
    kept = [fqn for fqn in SHAPES if fqn != "cube.weight"]
    parts = [fsdp2(Model({fqn: SHAPES[fqn] for fqn in fqns})) for fqns in (kept[:3], kept[3:])]
    return parts, [adamw(part) for part in parts]


def test_trainers_of_several_parts(four_saved: Path, trainers_with: Callable[..., list[Any]]) -> None:
    trainers = trainers_with(two_parts)
    spec = {"checkpoint": {"location": str(four_saved), "exclude": ["cube.*"]}}
    OptimizerLoadStage(StageConfig.model_validate(spec)).run(trainers)
    left_out = 2 * torch.Size(SHAPES["cube.weight"]).numel()
    assert sum(ray.get([trainer.check.remote() for trainer in trainers])) == NUM_ELEMENTS - left_out


def test_state_in_another_dtype_than_it_was_saved(four_saved: Path) -> None:
    checkpoint = {"location": str(four_saved), "wanted_dtypes": {"exp_avg": "bfloat16"}, "dtype": "cast"}
    stage = OptimizerLoadStage(config(None, 1, checkpoint=checkpoint))
    with stage.run() as result:
        state = result.handles[0].open().state_dict()["state"]["even.weight"]
    expected = full_tensor("even.weight", "exp_avg", SHAPES["even.weight"]).to(torch.bfloat16)
    assert torch.equal(state["exp_avg"], expected)
    assert state["exp_avg_sq"].dtype == torch.float32


def not_built() -> Target:
    """Fails when the trainer is asked for its layout."""
    raise InstallError("the model is not built yet")


def test_trainer_that_fails_ends_the_load(four_saved: Path, trainers_with: Callable[..., list[Any]]) -> None:
    trainers = trainers_with(not_built)
    with pytest.raises(InstallError, match="the model is not built yet"):
        OptimizerLoadStage(StageConfig.model_validate({"checkpoint": {"location": str(four_saved)}})).run(trainers)


def test_nothing_is_reserved_before_the_location_is_known(four_saved: Path) -> None:
    """An upstream task may need all GPUs to say where the checkpoint is."""
    gate = Gate.options(num_gpus=4).remote()
    loading = OptimizerLoadStage(config(None, 2)).submit(location=gate.location.remote(str(four_saved)))
    ray.get(gate.open.remote())
    ray.wait([gate.location.remote(str(four_saved))], timeout=30)
    ray.kill(gate)
    assert sum(map(check_shard, ray.get(loading.refs, timeout=60))) == NUM_ELEMENTS
    loading.close()


@ray.remote(num_cpus=0, max_concurrency=2)
class Gate:
    """Gives a location when it is told to."""

    def __init__(self) -> None:
        import threading

        self._open = threading.Event()

    def open(self) -> None:
        self._open.set()

    def location(self, path: str) -> str:
        assert self._open.wait(30)
        return path
