"""Train with torchtitan's optimizers and save with its CheckpointManager; or load what it saved, on any number of ranks."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig

import shardferry
from tests.programs.net import DECAYED, OTHERS, UNDECAYED, Net, loss_of
from tests.programs.whole_state import write_whole_state


def save(checkpoints: str, whole_state: str) -> None:
    model, optimizers = prepare(0, DECAYED, UNDECAYED)
    schedulers = LRSchedulersContainer.Config(warmup_steps=2).build(optimizers=optimizers, training_steps=10)
    manager = CheckpointManager.Config(enable=True, folder=checkpoints, interval=3).build(
        dataloader=None,
        model_parts=[model],
        optimizers=optimizers,
        lr_schedulers=schedulers,
        states={},
        sd_adapter=None,
    )
    for step in range(1, 4):
        optimizers.zero_grad()
        loss_of(model, step).backward()
        optimizers.step()
        schedulers.step()
        manager.save(step)
    write_whole_state(model, list(optimizers), whole_state)
    manager.close()


def load(checkpoints: str, whole_state: str) -> None:
    model, optimizers = prepare(1, OTHERS, OTHERS)
    shardferry.load_optimizer_state(model, optimizers, f"{checkpoints}/step-3", optimizer_key="optimizer")
    write_whole_state(model, list(optimizers), whole_state)


def prepare(seed: int, matrices: dict[str, Any], others: dict[str, Any]) -> tuple[nn.Module, OptimizersContainer]:
    """FSDP2 over all ranks, and a container of two optimizers, whose state is saved as one."""
    model, mesh = Net(seed), init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.up, mesh=mesh)
    fully_shard(model, mesh=mesh)
    groups = [
        ParamGroupConfig(pattern=r"norm|bias$", optimizer_name="Adam", optimizer_kwargs=others),
        ParamGroupConfig(pattern=r".*", optimizer_name="AdamW", optimizer_kwargs=matrices),
    ]
    config = OptimizersContainer.Config(param_groups=groups, implementation="foreach")
    return model, config.build(model_parts=[model])
