"""The stage between the steps of somebody else's pipeline, on Ray.

    python -m examples.larger_pipeline

evaluate the checkpoints -> pick the best -> load it on fewer ranks -> train on -> save -> report

Yesterday four trainers wrote checkpoints; the last save was cut off. Today there are two trainers. Steps are joined by ObjectRefs:
nothing waits in the driver before the stage does.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import shardferry
from examples.task import held_out_loss, make_optimizer, network, train_step
from shardferry.pipeline import OptimizerLoadStage
from shardferry.schemas import StageConfig

YESTERDAY, TODAY = 4, 2  # trainers
STEPS = 6  # a day; a checkpoint after each half of it


# --- evaluate and pick: tasks on any node -----------------------------------------------------------------------------


def complete(run: Path) -> list[str]:
    """The checkpoints whose save was completed: torch writes ``.metadata`` last."""
    return sorted(str(path) for path in run.glob("step-*") if (path / ".metadata").exists())


@ray.remote(num_cpus=1)
def evaluate(checkpoint: str) -> tuple[float, str]:
    """The loss on held-out data, and the checkpoint."""
    model = network()
    shardferry.load_model_state(model, checkpoint, model_key="model")  # the weights alone, whole
    return held_out_loss(model), checkpoint


@ray.remote(num_cpus=0)
def pick_best(*evaluated: tuple[float, str]) -> str:
    return min(evaluated)[1]


# --- train and save: actors, which import shardferry only -------------------------------------------------------------


class Trainer(shardferry.OptimizerReceiver):
    """One rank of an FSDP2 job."""

    def __init__(self, rank: int, world_size: int, rendezvous: str) -> None:
        store = dist.FileStore(rendezvous, world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        self.rank, self.world_size = rank, world_size
        self.model = fully_shard(network(), mesh=init_device_mesh("cpu", (world_size,)))
        self.optimizer = make_optimizer(self.model)

    def train(self, until: int) -> list[float]:
        """Train until so many steps are taken. Returns the loss before each."""
        steps = range(self.steps_taken(), until)
        own = [
            train_step(self.model, self.optimizer, step, rank=self.rank, world_size=self.world_size) for step in steps
        ]
        losses = torch.tensor(own)
        dist.all_reduce(losses)
        return (losses / self.world_size).tolist()

    def steps_taken(self) -> int:
        return max((int(state["step"]) for state in self.optimizer.state.values()), default=0)

    def save(self, path: str) -> str:
        weights, state = get_state_dict(self.model, self.optimizer)
        dcp.save({"model": weights, "optim": state}, checkpoint_id=path)
        return path


def start_trainers(world_size: int, rendezvous: Path) -> list[Any]:
    actor = ray.remote(num_cpus=1, num_gpus=1)(Trainer)
    return [actor.remote(rank, world_size, str(rendezvous)) for rank in range(world_size)]


# --- the pipeline -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What the pipeline did today."""

    picked: str
    steps_loaded: int
    losses: list[float]
    saved: str
    report: Path


def yesterday(run: Path) -> list[float]:
    """Train on four ranks and save; the last save is cut off."""
    trainers = start_trainers(YESTERDAY, run / "yesterday")
    losses: list[float] = []
    for until in (STEPS // 2, STEPS):
        losses += ray.get([trainer.train.remote(until) for trainer in trainers])[0]
        ray.get([trainer.save.remote(str(run / f"step-{until:06}")) for trainer in trainers])
    (run / f"step-{STEPS + 1:06}").mkdir()
    for trainer in trainers:
        ray.kill(trainer)
    return losses


def today(run: Path) -> Outcome:
    """Evaluate, pick, load on two ranks, train on, save, report."""
    location = pick_best.remote(*[evaluate.remote(checkpoint) for checkpoint in complete(run)])
    trainers = start_trainers(TODAY, run / "today")
    config = StageConfig.model_validate({"checkpoint": {"model_key": "model"}})
    result = OptimizerLoadStage(config).run(trainers, location=location)  # asks the trainers what each of them holds
    steps = ray.get(trainers[0].steps_taken.remote())
    losses = [trainer.train.remote(steps + STEPS) for trainer in trainers]
    saved = [trainer.save.remote(str(run / f"step-{steps + STEPS:06}")) for trainer in trainers]
    report = run / "report.json"
    report.write_text(result.report.model_dump_json(), encoding="utf-8")
    outcome = Outcome(ray.get(location), steps, ray.get(losses)[0], ray.get(saved)[0], report)
    for trainer in trainers:
        ray.kill(trainer)
    return outcome


def main() -> None:
    """Run both days on this machine."""
    if not ray.is_initialized():
        gpus = torch.cuda.device_count() or YESTERDAY  # logical ones on a machine without any
        ray.init(address="local", num_gpus=gpus, num_cpus=2 * YESTERDAY, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as run:
        losses = yesterday(Path(run))
        outcome = today(Path(run))
        print(f"yesterday {' '.join(f'{loss:.4f}' for loss in losses)} on {YESTERDAY} ranks")
        print(f"picked    {Path(outcome.picked).name}, loaded with {outcome.steps_loaded} steps taken")
        print(f"today     {' '.join(f'{loss:.4f}' for loss in outcome.losses)} on {TODAY} ranks")
        print(f"saved     {Path(outcome.saved).name}")
        print(f"report    {outcome.report.read_text(encoding='utf-8')[:200]} ...")


if __name__ == "__main__":
    main()
