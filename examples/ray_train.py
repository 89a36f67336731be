"""Ray Train: a job that goes on with fewer workers when a node dies, and the next one, which has another number of them.

    pip install '.[examples]'
    python -m examples.ray_train

The cluster is one of two nodes on this machine. After some steps one of them is killed: Ray Train starts the loop again with the
worker that is left, and the loop loads the last checkpoint that was reported.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ray.cluster_utils import Cluster
from ray.train import Checkpoint, FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import shardferry
from examples.task import make_optimizer, network, train_step

# Ray Train reads these from the driver's environment.
SETTINGS = {
    # Workers are reserved by what was known of the nodes up to 20 s ago. A start that waits for a dead one is given up after
    # so many seconds, and tried again; by default after 60.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",
    # A checkpoint that was reported is taken over so many seconds later; by default 2, in which a fast loop saves several.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
}
# A node that was killed is given up after 5 checks a second apart; by default after 15 s.
NODE_CHECKS = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_timeout_ms": 10_000}


def train_loop(config: dict[str, Any]) -> None:
    """What every worker runs, and runs again from the last checkpoint after a failure.

    Args:
        config: ``until``: train until so many steps are taken; ``resume_from``: the checkpoint to start from, if any.
    """
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    model = fully_shard(network(), mesh=init_device_mesh("cpu", (world_size,)))
    optimizer = make_optimizer(model)

    start = 0
    checkpoint = ray.train.get_checkpoint() or config["resume_from"]  # this run's own one first
    if checkpoint is not None:
        shardferry.load_optimizer_state(model, optimizer, checkpoint, optimizer_key="optim", model_key="model")
        start = int(next(iter(optimizer.state.values()))["step"])

    for step in range(start, config["until"]):
        loss = torch.tensor(train_step(model, optimizer, step, rank=rank, world_size=world_size))
        dist.all_reduce(loss)
        metrics = {"step": step + 1, "loss": float(loss) / world_size, "workers": world_size}
        with tempfile.TemporaryDirectory() as directory:
            weights, state = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optim": state}, checkpoint_id=directory)
            ray.train.report(
                metrics, checkpoint=Checkpoint.from_directory(directory)
            )  # workers' files are joined there


def fit(
    storage: Path, name: str, *, workers: int | tuple[int, int], until: int, resume_from: Checkpoint | None = None
) -> Result:
    """One job.

    Args:
        storage: a directory that all nodes see, or a URL.
        workers: their number, or the least and the most.
    """
    return TorchTrainer(
        train_loop,
        train_loop_config={"until": until, "resume_from": resume_from},
        scaling_config=ScalingConfig(num_workers=workers),
        run_config=RunConfig(name=name, storage_path=str(storage), failure_config=FailureConfig(max_failures=3)),
    ).fit()


def show(result: Result) -> None:
    """Print what was reported with each checkpoint."""
    for metrics in sorted((metrics for _, metrics in result.best_checkpoints or ()), key=lambda one: one["step"]):
        print(f"step {metrics['step']:>2} loss {metrics['loss']:.6f} on {metrics['workers']} workers", flush=True)


def kill_after(checkpoints: int, storage: Path, cluster: Cluster, node: Any) -> threading.Thread:
    """Kill a node once so many checkpoints are there."""

    def watch() -> None:
        while len(list(storage.glob("*/checkpoint_*/.metadata"))) < checkpoints:
            time.sleep(0.05)
        cluster.remove_node(node, allow_graceful=False)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def main(*, is_short: bool = False) -> None:
    """Run both jobs on a cluster of two nodes on this machine; a short run ends after the first one."""
    os.environ.update(SETTINGS)
    with tempfile.TemporaryDirectory(prefix="sf-") as temporary, tempfile.TemporaryDirectory() as storage:
        head = {"num_cpus": 1, "include_dashboard": False, "temp_dir": temporary, "_system_config": NODE_CHECKS}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            # While the head is the only node: else this process may belong to one that is killed.
            ray.init(address=cluster.address, log_to_driver=False)
            node = cluster.add_node(num_cpus=1)
            cluster.wait_for_nodes()
            killer = kill_after(3, Path(storage), cluster, node)
            elastic = fit(Path(storage), "elastic", workers=(1, 2), until=10)
            show(elastic)
            killer.join()
            if not is_short:
                cluster.add_node(num_cpus=1)
                show(fit(Path(storage), "resumed", workers=2, until=12, resume_from=elastic.checkpoint))
        finally:
            ray.shutdown()
            cluster.shutdown()


if __name__ == "__main__":
    main()
