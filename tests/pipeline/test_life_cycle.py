"""Whoever dies, cancels or fails: nothing is left behind, and no trainer is changed unless all are."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import torch.distributed.checkpoint as dcp
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import nn

import shardferry
from shardferry.errors import InstallError, LoadCancelled, RankError, SpecError
from shardferry.pipeline import OptimizerLoadStage
from shardferry.schemas import StageConfig
from tests.support.leftovers import nothing_held
from tests.support.models import SHAPES, Model, adamw, check_state
from tests.support.trainers import Fsdp2Trainer, Target, never_stepped

pytestmark = pytest.mark.usefixtures("cluster")

NUM_ELEMENTS = 2 * sum(torch.Size(shape).numel() for shape in SHAPES.values())


@pytest.fixture
def four_saved(saved_by: dict[int, Path]) -> Path:
    return saved_by[4]


def stage(path: Path | None, world_size: int = 0, **sections: Any) -> OptimizerLoadStage:
    """Of a spec with a topology of some ranks, or for trainers."""
    topology = {"mesh": {"dp": world_size}, "default": {"dp": "Shard(0)"}} if world_size else None
    checkpoint = {} if path is None else {"location": str(path)}
    values = {"checkpoint": checkpoint, "topology": topology, **sections}
    return OptimizerLoadStage(StageConfig.model_validate(values))


def bytes_of(handle: shardferry.ShardHandle) -> int:
    with handle.open() as shard:
        return sum(t.nbytes for state in shard.state_dict()["state"].values() for t in state.values())


def test_a_ref_alone_keeps_its_loader_and_frees_it(four_saved: Path) -> None:
    with nothing_held():
        refs = stage(four_saved, 2).submit().refs
        assert sum(map(bytes_of, ray.get(refs, timeout=100))) > 4 * NUM_ELEMENTS
        del refs


@ray.remote(num_cpus=0, max_retries=0)
def drive_and_hold(path: Path, pids: list[Any]) -> None:
    """Load on two GPUs, keep what is loaded, and never return."""
    result = stage(path, 2).run()
    ray.get(pids[0].tell.remote(os.getpid()))
    signal.pause()
    result.close()


@ray.remote(num_cpus=0)
class Pids:
    """Is told a process id."""

    def __init__(self) -> None:
        self._told = asyncio.Queue()

    async def tell(self, pid: int) -> None:
        await self._told.put(pid)

    async def told(self) -> int:
        return await self._told.get()


def test_the_task_that_drives_the_stage_is_killed(four_saved: Path) -> None:
    with nothing_held():
        pids = Pids.remote()
        running = drive_and_hold.remote(four_saved, [pids])
        os.kill(ray.get(pids.told.remote(), timeout=100), signal.SIGKILL)
        with pytest.raises(ray.exceptions.WorkerCrashedError):
            ray.get(running)


@ray.remote(num_cpus=0)
def never() -> str:
    signal.pause()
    return ""


@pytest.mark.parametrize("how", ["loading", "ref"])
def test_cancel(four_saved: Path, how: str) -> None:
    """While the location is awaited, and when all is loaded."""
    with nothing_held():
        location = never.remote()
        loading = stage(None, 2).submit(location=location)
        loading.cancel() if how == "loading" else ray.cancel(loading.refs[1])
        with pytest.raises(LoadCancelled, match="was cancelled"):
            loading.wait(timeout=60)
        with pytest.raises((LoadCancelled, ray.exceptions.RayTaskError, ray.exceptions.TaskCancelledError)):
            ray.get(loading.refs[0], timeout=60)
        ray.cancel(location, force=True)
    with nothing_held():
        loading = stage(four_saved, 1).submit()
        loading.wait()
        loading.cancel()


class Fails(Fsdp2Trainer):
    """Rank 1 fails in one of the steps, in one of the ways."""

    def fail(self, step: str, how: str) -> None:
        self._step, self._how = step, how

    def _maybe(self, step: str) -> None:
        if getattr(self, "_step", None) == step and torch.distributed.get_rank() == 1:
            if self._how == "raises":
                raise InstallError("this trainer is not ready")
            if self._how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()

    def shardferry_fit(self, handle: Any) -> None:
        self._maybe("fit")
        super().shardferry_fit(handle)

    def shardferry_install(self) -> None:
        super().shardferry_install()
        self._maybe("install")


def snapshot(trainer: Fsdp2Trainer) -> tuple[int, list[float]]:
    """How much state there is, and the hyperparameters."""
    _, optimizer = trainer.shardferry_target()
    return len(optimizer.state), [group["lr"] for group in optimizer.param_groups]


def test_all_trainers_or_none(four_saved: Path, tmp_path: Path) -> None:
    """One that raises, is late or dies leaves the other as it was; and a later stage finds both ready."""
    trainers = [ray.remote(num_cpus=0)(Fails).remote(rank, 2, str(tmp_path / "store")) for rank in range(2)]
    with nothing_held():
        ray.get([trainer.begin.remote(never_stepped) for trainer in trainers])
        before = ray.get(trainers[0].do.remote(snapshot))
        assert before[0] == 0
        for step in ("fit", "install"):
            ray.get([trainer.fail.remote(step, "raises") for trainer in trainers])
            with pytest.raises(InstallError, match="this trainer is not ready"):
                stage(four_saved).run(trainers)
            assert ray.get(trainers[0].do.remote(snapshot)) == before
        ray.get([trainer.fail.remote("", "") for trainer in trainers])
        stage(four_saved).run(trainers)
        assert sum(ray.get([trainer.check.remote() for trainer in trainers])) == NUM_ELEMENTS
        ray.get([trainer.begin.remote(never_stepped) for trainer in trainers])
        assert ray.get(trainers[0].do.remote(snapshot)) == before
        ray.get([trainer.fail.remote("install", "is late") for trainer in trainers])
        late = r"installing .* ranks \(1\) were not done within timeouts.handoff_s = 3 s"
        with pytest.raises(RankError, match=late):
            stage(four_saved, timeouts={"handoff_s": 3}).run(trainers)
        assert ray.get(trainers[0].do.remote(snapshot)) == before
        for trainer in trainers:
            ray.kill(trainer)


def test_a_trainer_that_dies_leaves_the_other_as_it_was(four_saved: Path, tmp_path: Path) -> None:
    trainers = [ray.remote(num_cpus=0)(Fails).remote(rank, 2, str(tmp_path / "store")) for rank in range(2)]
    with nothing_held():
        ray.get([trainer.begin.remote(never_stepped) for trainer in trainers])
        ray.get([trainer.fail.remote("install", "dies") for trainer in trainers])
        words = r"installing the shards in the trainers: the trainer of rank 1 died. Ray says: "
        with pytest.raises(RankError, match=words):
            stage(four_saved).run(trainers)
        assert ray.get(trainers[0].do.remote(snapshot))[0] == 0
        ray.kill(trainers[0])


def test_a_loader_that_stands_still_is_named_with_its_stack(four_saved: Path) -> None:
    """The trainer of rank 0 says late whether the plan fits: its loader waits for it, and moves no byte."""
    trainer = ray.remote(num_cpus=0)(Slow).remote()
    words = r"loading: .* within timeouts.load_s = 6 s; nothing was planned yet; no byte moved on rank 0; rank 0 stands in: .*_ask"
    with nothing_held():
        with pytest.raises(RankError, match=words):
            stage(four_saved, timeouts={"load_s": 6}).run([trainer])
        ray.kill(trainer)


class Slow(shardferry.OptimizerReceiver):
    """Says late what it thinks of a plan."""

    def __init__(self) -> None:
        self.model = Model()
        self.optimizer = adamw(self.model)

    def shardferry_check(self, part: int, manifest: Any) -> None:
        time.sleep(60)


@ray.remote(num_cpus=1, num_gpus=1)
class Captures:
    """As a worker of Ray Train or Ray Tune: what it starts is captured by its placement group."""

    def run(self, path: Path) -> tuple[int, bool]:
        own = ray.util.get_current_placement_group()
        loading = stage(path, 2).submit()
        placement = loading.started().placement
        found = sum(map(bytes_of, ray.get(loading.refs)))
        loading.close()
        return found, own is not None and placement.group is not None and placement.group.id == own.id


def test_in_a_placement_group_that_captures(four_saved: Path) -> None:
    """All GPUs are in the group: a group of the stage's own would wait for ever."""
    group = placement_group([{"CPU": 1, "GPU": 1}, {"CPU": 2, "GPU": 3}])
    strategy = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True)
    with nothing_held():
        worker = Captures.options(scheduling_strategy=strategy).remote()
        found, is_captured = ray.get(worker.run.remote(four_saved), timeout=200)
        assert is_captured
        assert found > 4 * NUM_ELEMENTS
        ray.kill(worker)
        remove_placement_group(group)


def test_a_wrong_optimizer_is_refused_before_the_read(
    four_saved: Path, trainers_with: Callable[..., list[Any]]
) -> None:
    def sgd() -> Target:
        model, optimizer = never_stepped()
        return model, torch.optim.SGD(model.parameters(), lr=optimizer.param_groups[0]["lr"], momentum=0.9)

    trainers = trainers_with(sgd)
    with nothing_held(), pytest.raises(InstallError, match=r"exp_avg.*momentum_buffer"):
        stage(None, checkpoint={"location": str(four_saved), "hyperparameters": "live"}).run(trainers)


@ray.remote(num_cpus=0)
class NoReceiver:
    """Knows nothing of us."""

    def ready(self) -> bool:
        return True


def test_actors_that_are_no_receivers(four_saved: Path) -> None:
    with nothing_held():
        with pytest.raises(
            SpecError, match=r"trainers\[0\]: .* has no method shardferry_layout and no shardferry_receive"
        ):
            stage(four_saved).run([NoReceiver.remote()])
        with pytest.raises(SpecError, match="an empty list"):
            stage(four_saved).run([])


@ray.remote(num_cpus=0)
class ByName:
    """Can't inherit, and has methods of the names."""

    def __init__(self, store: str) -> None:
        store = torch.distributed.FileStore(store, 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        self.model, self.optimizer = never_stepped()

    def shardferry_layout(self, world_rank: int, world_size: int) -> Any:
        return shardferry.describe_layout(self.model, self.optimizer, world_rank, world_size)

    def shardferry_receive(self, handle: Any) -> Any:
        return shardferry.receive(handle, self.model, self.optimizer)

    def from_ref(self, refs: list[Any]) -> int:
        self.model, self.optimizer = never_stepped()
        shardferry.receive(refs[0], self.model, self.optimizer)
        return self.check()

    def check(self) -> int:
        return check_state(self.model, self.optimizer)


def test_receivers_by_the_names_of_their_methods(four_saved: Path, tmp_path: Path) -> None:
    trainer = ByName.remote(str(tmp_path / "store"))
    stage(four_saved).run([trainer])
    assert ray.get(trainer.check.remote()) == NUM_ELEMENTS
    loading = stage(four_saved).submit([trainer])
    assert ray.get(trainer.from_ref.remote([loading.refs[0]])) == NUM_ELEMENTS
    loading.close()
    ray.kill(trainer)


@ray.remote(num_cpus=0)
class AsyncDriver:
    """Its loop ticks while the stage runs."""

    async def run(self, path: Path) -> tuple[int, int]:
        ticks, done = 0, asyncio.Event()

        async def tick() -> None:
            nonlocal ticks
            while not done.is_set():
                ticks += 1
                await asyncio.sleep(0.02)

        ticking = asyncio.create_task(tick())
        result = await stage(path, 1).run_async()
        loading = stage(path, 1).submit()
        again = await loading
        (handle,) = await asyncio.gather(*loading.refs)
        done.set()
        await ticking
        found = bytes_of(handle)
        result.close()
        again.close()
        return ticks, found


def test_an_async_actor_is_never_blocked(four_saved: Path) -> None:
    with nothing_held():
        ticks, found = ray.get(AsyncDriver.remote().run.remote(four_saved))
        assert ticks > 20
        assert found > 4 * NUM_ELEMENTS


@ray.remote(num_cpus=0)
def topology_of(world_size: int) -> dict[str, Any]:
    return {"mesh": {"dp": world_size}, "default": {"dp": "Shard(0)"}}


def test_the_topology_of_an_upstream_task(four_saved: Path) -> None:
    with nothing_held():
        loading = stage(four_saved).submit(topology=topology_of.remote(3))
        assert len(ray.get(loading.refs)) == 3
        assert loading.result().report.world_size == 3
        loading.close()
        with pytest.raises(SpecError, match="topology: is a str"):
            stage(four_saved).submit(topology=ray.put("dp=2")).wait()


def saved_gan(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Save two models and their optimizers under keys of their own; returns their moments and weights."""
    state, expected = {}, {}
    for place, name in enumerate(("gen", "disc")):
        torch.manual_seed(place)
        model = nn.Linear(4, 3 + place)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * (place + 1))
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        saved = torch.distributed.checkpoint.state_dict.get_optimizer_state_dict(model, optimizer)
        state |= {name: model.state_dict(), f"optim_{name}": saved}
        expected[f"optim_{name}"] = {
            "weight": model.weight.detach().clone(),
            "exp_avg": optimizer.state[model.weight]["exp_avg"].clone(),
        }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that one process saves
        dcp.save(state, checkpoint_id=path, no_dist=True)
    return expected


class Gan(shardferry.OptimizerReceiver):
    """Two models, each with an optimizer of its own."""

    def __init__(self) -> None:
        self.models = {"optim_gen": nn.Linear(4, 3), "optim_disc": nn.Linear(4, 4)}
        self.optimizers = {key: torch.optim.AdamW(model.parameters()) for key, model in self.models.items()}

    def shardferry_target(self) -> Any:
        return self.models, self.optimizers

    def loaded(self) -> dict[str, dict[str, torch.Tensor]]:
        return {
            key: {"weight": model.weight.detach(), "exp_avg": self.optimizers[key].state[model.weight]["exp_avg"]}
            for key, model in self.models.items()
        }


@pytest.mark.parametrize("transport", ["auto", "object_store", "in_process"])
def test_several_optimizers_under_several_keys(tmp_path: Path, transport: str) -> None:
    expected = saved_gan(tmp_path)
    trainer = ray.remote(num_cpus=0)(Gan).remote()
    checkpoint = {"location": str(tmp_path), "model_key": {"optim_gen": "gen", "optim_disc": "disc"}}
    report = stage(None, checkpoint=checkpoint, handoff={"transport": transport}).run([trainer]).report
    found = ray.get(trainer.loaded.remote())
    for key, tensors in expected.items():
        for name, tensor in tensors.items():
            assert torch.equal(found[key][name], tensor), (key, name)
    assert report.unique_bytes_needed <= report.storage_bytes_read
    assert [rank.transport for rank in report.ranks] != ["auto"]
    ray.kill(trainer)


def test_no_loaders_at_all(four_saved: Path, trainers_with: Callable[..., list[Any]]) -> None:
    trainers = trainers_with(never_stepped)
    in_process = stage(four_saved, handoff={"transport": "in_process"})
    report = in_process.run(trainers).report
    assert sum(ray.get([trainer.check.remote() for trainer in trainers])) == NUM_ELEMENTS
    assert [rank.transport for rank in report.ranks] == ["in_process"] * 2
    assert report.storage_bytes_read >= report.unique_bytes_needed > 4 * NUM_ELEMENTS
    with pytest.raises(SpecError, match="in_process loads inside the trainers"):
        in_process.submit(trainers)
    with pytest.raises(SpecError, match="none were given"):
        in_process.run()
