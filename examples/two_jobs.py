"""Jobs that share loaded state: the first loads and keeps it, the second attaches, is killed, and attaches again.

    python -m examples.two_jobs

A third job takes the same state on another number of ranks, out of the memory of the first one's loaders. The checkpoint is
deleted after the first job: nobody else reads it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import ray
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

import shardferry
from shardferry.pipeline import OptimizerLoadStage
from shardferry.schemas import StageConfig

NAME = "two-jobs"
STEPS = 3


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, steps: int) -> float:
    """Take some steps; returns the last loss."""
    loss = torch.zeros(())
    for step in range(first, first + steps):
        batch = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
        loss = (model(batch) - batch.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def save(path: Path) -> float:
    """Train and save; returns the loss that a run without interruption has after as many steps again."""
    model, optimizer = make()
    train(model, optimizer, 0, STEPS)
    state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that one process saves
        dcp.save(state, checkpoint_id=path)
    return train(model, optimizer, STEPS, STEPS)


def spec(ranks: int, location: str) -> StageConfig:
    topology = {"mesh": {"dp": ranks}, "default": {"dp": "Shard(0)"}}
    return StageConfig.model_validate(
        {"checkpoint": {"location": location, "model_key": "model"}, "topology": topology}
    )


def load_and_keep(location: str) -> None:
    """The first job."""
    OptimizerLoadStage(spec(1, location)).run(keep=NAME)


def attach_and_train(then: str) -> None:
    """The second job: one rank's state is all of it here."""
    model, optimizer = make()
    start = time.perf_counter()
    with shardferry.attach(NAME, rank=0).open() as shard:
        shard.load_into(model, optimizer)
    print(f"attached in {1e3 * (time.perf_counter() - start):.1f} ms", file=sys.stderr)
    print(train(model, optimizer, STEPS, STEPS), flush=True)
    if then == "hang":
        time.sleep(600)  # until it is killed


def reshard() -> None:
    """The third job: the same state on three ranks, from memory."""
    with OptimizerLoadStage(spec(3, f"shardferry+memory://{NAME}")).run() as result:
        print(sum(handle.manifest.world_size == 3 for handle in result.handles))


def job(address: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "examples.two_jobs", "job", address, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(address: str) -> tuple[float, list[float], int]:
    """The whole story: the loss to be reached, those of the two attempts, and the ranks of the third job."""
    with tempfile.TemporaryDirectory() as directory:
        expected = save(Path(directory) / "ckpt")
        first = job(address, "load", str(Path(directory) / "ckpt"))
        first.communicate(timeout=200)
        assert first.returncode == 0, "the first job has failed"
        shutil.rmtree(Path(directory) / "ckpt")  # from here on there is the memory alone
    losses = []
    for then in ("hang", "end"):
        second = job(address, "attach", then)
        losses.append(float(first_line(second)))
        second.kill() if then == "hang" else second.wait(100)
        second.communicate()
    third = job(address, "reshard")
    ranks = int(third.communicate(timeout=200)[0].split()[-1])
    return expected, losses, ranks


def main() -> None:
    if sys.argv[1:2] == ["job"]:
        _, _, address, what, *more = sys.argv
        ray.init(address=address, log_to_driver=False)
        {"load": load_and_keep, "attach": attach_and_train, "reshard": reshard}[what](*more)
        return
    ray.init(address="local", num_gpus=3, include_dashboard=False, log_to_driver=False)
    expected, losses, ranks = tell(ray.get_runtime_context().gcs_address)
    print(f"uninterrupted: {expected:.6f}; attached, and again after a kill: {losses}; resharded to {ranks} ranks")
    assert losses == [expected] * 2
    ray.shutdown()


if __name__ == "__main__":
    main()
