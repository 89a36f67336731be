"""Train with Lightning Fabric's ModelParallelStrategy (FSDP2) and save; or load what it saved, on any number of ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import shardferry
from tests.programs.net import DECAYED, OTHERS, UNDECAYED, Net, groups_of, loss_of
from tests.programs.whole_state import write_whole_state


def save(checkpoint: str, whole_state: str) -> None:
    fabric, model, optimizer = prepare(0, DECAYED, UNDECAYED)
    for batch in range(3):
        fabric.backward(loss_of(model, batch))
        optimizer.step()
        optimizer.zero_grad()
    fabric.save(checkpoint, {"model": model, "optimizer": optimizer, "step": 3})
    write_whole_state(model.module, optimizer.optimizer, whole_state)


def load(checkpoint: str, whole_state: str) -> None:
    _, model, optimizer = prepare(1, OTHERS, OTHERS)
    shardferry.load_optimizer_state(model, optimizer, checkpoint, optimizer_key="optimizer")
    write_whole_state(model.module, optimizer.optimizer, whole_state)


def prepare(seed: int, *hyperparameters: dict[str, Any]) -> tuple[Fabric, nn.Module, torch.optim.Optimizer]:
    num_ranks = dist.get_world_size()
    strategy = ModelParallelStrategy(parallelize, data_parallel_size=num_ranks, tensor_parallel_size=1)
    fabric = Fabric(accelerator="cpu", devices=num_ranks, strategy=strategy)
    fabric.launch()
    model = fabric.setup_module(Net(seed))
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(groups_of(model, *hyperparameters)))
    return fabric, model, optimizer


def parallelize(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    fully_shard(model.up, mesh=mesh["data_parallel"])
    return fully_shard(model, mesh=mesh["data_parallel"])
