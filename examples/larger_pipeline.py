"""The stage between two Ray steps of somebody else's pipeline: pick a checkpoint, load it on fewer ranks, train on.

    python -m examples.larger_pipeline

Yesterday four trainers wrote checkpoints; the newest was cut off. Today there are two. Steps are joined by ObjectRefs:
nothing waits in the driver until the last line asks for the losses.
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
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import shardferry
from shardferry.pipeline import OptimizerLoadStage
from shardferry.schemas import StageConfig

YESTERDAY, TODAY = 4, 2  # trainers
STEPS = 6  # a day


# --- somebody else's first step: it knows nothing of Shardferry ------------------------------------------------------


@ray.remote(num_cpus=0)
def newest_complete(run: str) -> str:
    """The last checkpoint whose save was completed: DCP writes ``.metadata`` last."""
    complete = [path for path in Path(run).glob("step-*") if (path / ".metadata").exists()]
    return str(max(complete, key=lambda path: int(path.name.removeprefix("step-"))))


# --- somebody else's last step: trainers, which import shardferry only ------------------------------------------------


class Trainer(shardferry.OptimizerReceiver):
    """One rank of an FSDP2 job."""

    def __init__(self, world_rank: int, world_size: int, rendezvous: str) -> None:
        store = dist.FileStore(rendezvous, world_size)
        dist.init_process_group("gloo", store=store, rank=world_rank, world_size=world_size)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64))
        self.model = fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)

    def train(self, num_steps: int) -> list[float]:
        """Loss after each step; every rank sees the same data, so that all days compare."""
        inputs = torch.linspace(-1, 1, 32 * 64).view(32, 64)
        losses = []
        for _ in range(num_steps):
            loss = (self.model(inputs) - inputs.sin()).square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(float(loss))
        return losses

    def save(self, path: str) -> None:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.save({"model": model, "optim": optimizer}, checkpoint_id=path)

    def restore_model(self, path: str) -> str:
        """The weights, by stock torch."""
        weights = {"model": get_model_state_dict(self.model)}
        dcp.load(weights, checkpoint_id=path)
        set_model_state_dict(self.model, weights["model"])
        return path

    def steps_taken(self) -> int:
        return int(next(iter(self.optimizer.state.values()))["step"])


def start_trainers(world_size: int, rendezvous: Path) -> list[Any]:
    actor = ray.remote(num_cpus=1, num_gpus=1)(Trainer)
    return [actor.remote(rank, world_size, str(rendezvous)) for rank in range(world_size)]


# --- the pipeline ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What the pipeline did."""

    location: str
    yesterday: list[float]
    steps_loaded: int
    today: list[float]
    read_amplification: float


def yesterday(run: Path) -> list[float]:
    """Train and save on four ranks, twice; the second save is cut off."""
    trainers = start_trainers(YESTERDAY, run / "yesterday")
    losses = ray.get([trainer.train.remote(STEPS) for trainer in trainers])[0]
    ray.get([trainer.save.remote(str(run / f"step-{STEPS}")) for trainer in trainers])
    (run / f"step-{STEPS + 1}").mkdir()
    for trainer in trainers:
        ray.kill(trainer)
    return losses


def today(run: Path, losses: list[float]) -> Outcome:
    """Pick, load on two ranks, train on."""
    location = newest_complete.remote(str(run))  # an ObjectRef: the stage waits for it, we don't
    trainers = start_trainers(TODAY, run / "today")
    restored = [trainer.restore_model.remote(location) for trainer in trainers]
    result = OptimizerLoadStage(StageConfig()).run(trainers, location=location)
    steps = ray.get(trainers[0].steps_taken.remote())
    further = [trainer.train.remote(STEPS) for trainer in trainers]
    outcome = Outcome(ray.get(restored[0]), losses, steps, ray.get(further)[0], result.report.read_amplification)
    for trainer in trainers:
        ray.kill(trainer)
    return outcome


def main() -> None:
    """Run both days on this machine."""
    if not ray.is_initialized():
        gpus = torch.cuda.device_count() or YESTERDAY  # logical ones on a machine without any
        ray.init(address="local", num_gpus=gpus, num_cpus=2 * YESTERDAY, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as run:
        outcome = today(Path(run), yesterday(Path(run)))
    print(
        f"picked      {Path(outcome.location).name} of {YESTERDAY} ranks, loaded on {TODAY} with {outcome.steps_loaded} steps taken"
    )
    print(f"yesterday   {' '.join(f'{loss:.4f}' for loss in outcome.yesterday)}")
    print(f"today       {' '.join(f'{loss:.4f}' for loss in outcome.today)}")
    print(f"bytes read  {outcome.read_amplification:.2f} x the needed ones")


if __name__ == "__main__":
    main()
