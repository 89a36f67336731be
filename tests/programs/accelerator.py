"""Train with Hugging Face accelerate's FSDP2 and save; or load what it saved, on any number of ranks."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from torch import nn

import shardferry
from tests.programs.net import DECAYED, OTHERS, UNDECAYED, Net, groups_of, loss_of
from tests.programs.whole_state import write_whole_state


def save(checkpoint: str, whole_state: str) -> None:
    accelerator, model, optimizer = prepare(0, DECAYED, UNDECAYED)
    for batch in range(3):
        accelerator.backward(loss_of(model, batch))
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(checkpoint)
    write_whole_state(model, optimizer, whole_state)


def load(checkpoint: str, whole_state: str) -> None:
    _, model, optimizer = prepare(1, OTHERS, OTHERS)
    shardferry.load_optimizer_state(model, optimizer, f"{checkpoint}/optimizer_0", optimizer_key="optimizer")
    write_whole_state(model, optimizer, whole_state)


def prepare(seed: int, *hyperparameters: dict[str, Any]) -> tuple[Accelerator, nn.Module, torch.optim.Optimizer]:
    # Accelerate heeds its FSDP plugin only where it found GPUs. Past that choice all its code runs on the CPU as it is.
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        state_dict_type="SHARDED_STATE_DICT",
        auto_wrap_policy="size_based_wrap",
        min_num_params=10,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    assert accelerator.is_fsdp2
    model = Net(seed)
    optimizer = torch.optim.AdamW(groups_of(model, *hyperparameters))
    return accelerator, *accelerator.prepare(model, optimizer)
