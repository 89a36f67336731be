"""torchrun without Ray: train under FSDP2, save with torch, and resume on another number of processes.

    torchrun --standalone --nproc-per-node 4 -m examples.torchrun runs/a --until 6
    torchrun --standalone --nproc-per-node 2 -m examples.torchrun runs/a --until 12

The second command finds the checkpoint that the first one has saved after 6 steps, and goes on from there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import shardferry
from examples.task import make_optimizer, network, train_step


def newest_complete(directory: Path) -> Path | None:
    """The last checkpoint whose save was completed: torch writes ``.metadata`` last."""
    complete = [path for path in directory.glob("step-*") if (path / ".metadata").exists()]
    return max(complete, key=steps_taken, default=None)


def steps_taken(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def main(arguments: Sequence[str] | None = None) -> None:
    """One process of a job."""
    parser = argparse.ArgumentParser(description="Train, or go on training, under FSDP2.")
    parser.add_argument("directory", type=Path, help="of the checkpoints; all processes must see it")
    parser.add_argument("--until", type=int, required=True, help="train until so many steps are taken, and save")
    given = parser.parse_args(arguments)

    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = fully_shard(network(), mesh=init_device_mesh("cpu", (world_size,)))
    optimizer = make_optimizer(model)

    start, checkpoint = 0, newest_complete(given.directory)
    if checkpoint is not None:
        # On all ranks, after the model is wrapped and the optimizer is made. Neither needs to have taken a step.
        shardferry.load_optimizer_state(model, optimizer, checkpoint, optimizer_key="optim", model_key="model")
        start = steps_taken(checkpoint)
        say(f"resumed {checkpoint.name}, world size {world_size}")

    for step in range(start, given.until):
        loss = torch.tensor(train_step(model, optimizer, step, rank=rank, world_size=world_size))
        dist.all_reduce(loss)
        say(f"step {step} loss {float(loss) / world_size:.6f}")

    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optim": state}, checkpoint_id=given.directory / f"step-{given.until}")
    say(f"saved step-{given.until}")
    dist.destroy_process_group()


def say(words: str) -> None:
    """Print once for the job."""
    if dist.get_rank() == 0:
        print(words, flush=True)


if __name__ == "__main__":
    main()
