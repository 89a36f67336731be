"""Ray Train with one to three workers, from state that stays in the cluster's memory: a node is killed, others are added.

    pip install '.[examples]'
    python -m examples.elastic

The cluster is one of several nodes on this machine. The head keeps what was loaded once; then the checkpoint is deleted. Whenever
Ray Train starts its workers again, on fewer nodes or on more, they take the state out of that memory, each its part of it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ray.cluster_utils import Cluster
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import shardferry
from examples.ray_train import NODE_CHECKS, SETTINGS
from examples.task import make_optimizer, network, train_step
from shardferry.pipeline import OptimizerLoadStage
from shardferry.schemas import StageConfig

NAME = "elastic"
SAVED_AT, UNTIL = 3, 9  # steps
SHOWN = 2  # steps that each group of workers takes before something happens to it
TRAINER = {"trainer": 1.0}  # a resource of the nodes that train


def train_loop(config: dict[str, str]) -> None:
    """What every worker runs, and runs again with another number of workers.

    Args:
        config: ``log``: a file that gets a line for each step; ``last``: a file that is there once no more workers will come.
    """
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    model = fully_shard(network(), mesh=init_device_mesh("cpu", (world_size,)))
    optimizer = make_optimizer(model)
    shardferry.load_optimizer_state(model, optimizer, f"shardferry+memory://{NAME}", model_key="model")

    start = int(next(iter(optimizer.state.values()))["step"])
    for step in range(start, UNTIL):
        while step >= start + SHOWN and not Path(config["last"]).exists():
            time.sleep(0.1)  # until these workers are replaced
        loss = torch.tensor(train_step(model, optimizer, step, rank=rank, world_size=world_size))
        dist.all_reduce(loss)
        if rank == 0:
            line = {"step": step + 1, "loss": float(loss) / world_size, "workers": world_size}
            with Path(config["log"]).open("a") as log:
                log.write(json.dumps(line) + "\n")
    ray.train.report({})


def save(path: Path) -> None:
    """Train some steps on one rank, and save."""
    model = network()
    optimizer = make_optimizer(model)
    for step in range(SAVED_AT):
        train_step(model, optimizer, step)
    weights, state = get_state_dict(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that one process saves
        dcp.save({"model": weights, "optim": state}, checkpoint_id=path)


def keep(path: Path) -> None:
    """Load on two ranks and keep; then nobody needs the checkpoint any more, and it is deleted."""
    spec = {
        "checkpoint": {"location": str(path), "model_key": "model"},
        "topology": {"mesh": {"dp": 2}, "default": {"dp": "Shard(0)"}},
    }
    OptimizerLoadStage(StageConfig.model_validate(spec)).run(keep=NAME)
    shutil.rmtree(path)


def fit(directory: Path) -> None:
    """Train on one to three workers, as many as there are nodes for."""
    TorchTrainer(
        train_loop,
        train_loop_config={"log": str(directory / "log"), "last": str(directory / "last")},
        scaling_config=ScalingConfig(
            num_workers=(1, 3), resources_per_worker=TRAINER, elastic_resize_monitor_interval_s=1.0
        ),
        run_config=RunConfig(
            name=NAME, storage_path=str(directory / "train"), failure_config=FailureConfig(max_failures=3)
        ),
    ).fit()


def steps(directory: Path) -> list[dict[str, Any]]:
    """What was logged, in order."""
    log = directory / "log"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def change_nodes(cluster: Cluster, first: Any, directory: Path, training: Future[None]) -> None:
    """Kill a node once two workers have trained, and add two more once one has. Ray adds nodes in a process's main thread alone."""

    def wait_for(workers: int) -> None:
        while sum(line["workers"] == workers for line in steps(directory)) < SHOWN:
            if training.done():
                training.result()
            time.sleep(0.1)

    wait_for(2)
    cluster.remove_node(first, allow_graceful=False)
    wait_for(1)
    for _ in range(2):
        cluster.add_node(num_cpus=0, resources=TRAINER)
    wait_for(3)
    (directory / "last").touch()


def main() -> None:
    """The whole story, on a cluster of several nodes on this machine."""
    os.environ.update(SETTINGS)
    with tempfile.TemporaryDirectory(prefix="sf-") as temporary, tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        head = {"num_cpus": 1, "include_dashboard": False, "temp_dir": temporary, "_system_config": NODE_CHECKS}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            # While the head is the only node: else this process may belong to one that is killed.
            ray.init(address=cluster.address, log_to_driver=False)
            nodes = [cluster.add_node(num_cpus=0, resources=TRAINER) for _ in range(2)]
            cluster.wait_for_nodes()
            save(directory / "ckpt")
            keep(directory / "ckpt")
            with ThreadPoolExecutor(1) as thread:
                training = thread.submit(fit, directory)
                change_nodes(cluster, nodes[0], directory, training)
                training.result()
            for line in steps(directory):
                print(f"step {line['step']} loss {line['loss']:.6f} on {line['workers']} workers", flush=True)
        finally:
            ray.shutdown()
            cluster.shutdown()


if __name__ == "__main__":
    main()
