"""Turn Megatron-Core into ``megatron-<version>.tar.xz`` beside it: small ``torch_dist`` checkpoints of AdamW state.

    pip install megatron-core==0.16.1; python tests/data/write_megatron.py

Megatron's optimizers need a GPU, its checkpoints don't: two gloo ranks do here what their ``sharded_state_dict`` does,
with Megatron's own functions, and ``dist_checkpointing.save`` writes. The checkpoints:

* ``canonical``: as FP32Optimizer and ``fully_reshardable``: a tensor a parameter, ``optimizer.state.<name>.<fqn>``.
* ``groups``: the same with two param groups that differ.
* ``args``: the same with the trainer's arguments (an ``argparse.Namespace``) in ``common.pt``.
* ``stacked``: ``second.weight`` is the second of two equal layers that share one key, as Megatron stacks its layers.
* ``buckets``: as ``dp_reshardable``: flat buffers, ``optimizer.distributed.dp_group_idx_0...``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    optim_state_to_sharding_state,
)
from write import GROUPS, SHAPES, STEP, oracle, pack

CUT = {"first.weight": 0, "second.weight": 1}  # the dimension that tensor parallelism cuts
BUCKET = "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.float32, torch.float32).bucket_idx_0"


def local(tensor: torch.Tensor, fqn: str) -> torch.Tensor:
    if fqn not in CUT:
        return tensor
    return tensor.chunk(2, dim=CUT[fqn])[dist.get_rank()].contiguous()


def sharded(fqn: str, tensor: torch.Tensor, *, stacked: bool) -> ShardedTensor:
    rank = dist.get_rank()
    layers = [(0, 1, 2)] if stacked else []  # of dimension, position, number
    cut = [(CUT[fqn] + len(layers), rank, 2)] if fqn in CUT else []
    replica = 0 if fqn in CUT else rank
    key = "layers.weight" if stacked else fqn
    return ShardedTensor.from_rank_offsets(key, tensor, *layers, *cut, replica_id=replica, prepend_axis_num=len(layers))


def optimizer_state(*, num_groups: int, stack: str | None) -> dict[str, Any]:
    """What FP32Optimizer.sharded_state_dict gives."""
    parameters = {fqn: torch.nn.Parameter(local(oracle(fqn, "weight"), fqn)) for fqn in SHAPES}
    matrices, vectors = list(parameters.values())[:2], list(parameters.values())[2:]
    split = [matrices, vectors] if num_groups == 2 else [matrices + vectors]
    optimizer = torch.optim.AdamW([{"params": p, **g} for p, g in zip(split, GROUPS, strict=False)])
    for fqn, parameter in parameters.items():
        state = {name: local(oracle(fqn, name), fqn) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(STEP), **state}
    model = {fqn: sharded(fqn, p, stacked=fqn == stack) for fqn, p in parameters.items()}
    if stack:  # the other layer of the stack
        model["other"] = sharded(stack, torch.nn.Parameter(torch.zeros_like(parameters[stack])), stacked=True)
        model["other"].global_offset = (0, *model["other"].global_offset[1:])
    in_order = [p for group in optimizer.param_groups for p in group["params"]]
    state = optimizer.state_dict()
    optim_state_to_sharding_state(state, get_param_id_to_sharded_param_map(model, in_order), exclude_keys="step")
    if stack:
        for name in ("exp_avg", "exp_avg_sq"):
            other = sharded(stack, torch.zeros_like(parameters[stack].detach()), stacked=True)
            other.key = f"optimizer.state.{name}.layers.weight"
            other.global_offset = (0, *other.global_offset[1:])
            state["state"][f"other.{name}"] = other
    state["state"]["common_step"] = torch.tensor(STEP)
    return state


def bucket_state() -> dict[str, Any]:
    """What DistributedOptimizer.sharded_param_state_dp_reshardable gives: each rank's half of one flat buffer."""
    rank = dist.get_rank()
    state: dict[str, Any] = {
        "per_bucket_numel": ShardedObject(
            f"{BUCKET.partition('.gbuf')[0]}.per_bucket_numel", [[48]], (1,), (0,), replica_id=rank
        )
    }
    for name in ("param", "exp_avg", "exp_avg_sq"):
        whole = torch.cat([oracle(fqn, name).view(-1) for fqn in SHAPES])
        whole = torch.cat([whole, whole[:1]])  # padded to two equal halves
        half = whole.chunk(2)[rank].contiguous()
        state[name] = ShardedTensor(
            f"{BUCKET}.{name}", half, half.dtype, half.shape, tuple(whole.shape), (rank * len(half),), None
        )
    return state


def save(directory: Path, kind: str) -> None:
    common: dict[str, Any] = {"checkpoint_version": 3.0, "iteration": int(STEP)}
    if kind == "args":
        common["args"] = argparse.Namespace(lr=0.125, params_dtype=torch.bfloat16)
    if kind == "buckets":
        state = bucket_state()
    else:
        state = optimizer_state(
            num_groups=2 if kind == "groups" else 1, stack="second.weight" if kind == "stacked" else None
        )
    if dist.get_rank() == 0:
        (directory / kind).mkdir()
    dist.barrier()
    dist_checkpointing.save({**common, "optimizer": state}, str(directory / kind))


def rank_main(rank: int, directory: Path) -> None:
    # All that Megatron wants of a GPU here: to wait for it, and to count failures on it.
    torch.cuda.synchronize = lambda: None
    torch.cuda.current_device = lambda: "cpu"
    rendezvous = str(directory / "rendezvous")
    dist.init_process_group("gloo", store=dist.FileStore(rendezvous, 2), rank=rank, world_size=2)
    for kind in ("canonical", "groups", "args", "stacked", "buckets"):
        save(directory, kind)
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["TORCH_DIST_INIT_BARRIER"] = "1"
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as temporary:
        ranks = [spawn.Process(target=rank_main, args=(rank, Path(temporary))) for rank in range(2)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
            assert rank.exitcode == 0
        Path(temporary, "rendezvous").unlink(missing_ok=True)
        target = Path(__file__).parent / f"megatron-{version('megatron-core')}.tar.xz"
        target.write_bytes(pack(Path(temporary)))
    print(target.name, target.stat().st_size, "bytes", file=sys.stderr)
