"""Train, save and restore the demo's model with stock torch, as an FSDP2 program does."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from shardferry.pipeline.demo.data import batch
from shardferry.pipeline.demo.model import GPT, GPTConfig, build_gpt


def build() -> tuple[GPT, torch.optim.Optimizer]:
    """The model under FSDP2, over all ranks of the default process group, and AdamW with two param groups."""
    torch.set_num_threads(1)
    model = build_gpt()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp_shard",))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, adamw(model)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with two param groups: matrices have weight decay; norms, biases and embeddings have none and a higher rate."""
    decayed = [p for name, p in model.named_parameters() if p.ndim >= 2 and "embedding" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "embedding" in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0, "lr": 2e-3}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))


def train(model: GPT, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> list[float]:
    """Take the given steps. Returns the loss of each, averaged over all ranks, not rounded."""
    world_rank, world_size = dist.get_rank(), dist.get_world_size()
    losses = []
    for step in steps:
        tokens, targets = batch(step, context=GPTConfig().context, world_rank=world_rank, world_size=world_size)
        loss = model(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / world_size)
    return losses


def save(model: nn.Module, optimizer: torch.optim.Optimizer, path: str | Path) -> None:
    """Save weights and optimizer state with stock ``dcp.save``."""
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optim": state}, checkpoint_id=path)


def load_model(model: nn.Module, path: str | Path) -> None:
    """Load the weights with stock ``dcp.load``."""
    state_dict = {"model": get_model_state_dict(model)}
    dcp.load(state_dict, checkpoint_id=path)
    set_model_state_dict(model, state_dict["model"])


def load_all(model: nn.Module, optimizer: torch.optim.Optimizer, path: str | Path) -> None:
    """Load weights and optimizer state with stock ``dcp.load``: the control."""
    weights, state = get_state_dict(model, optimizer)
    state_dict: dict[str, Any] = {"model": weights, "optim": state}
    dcp.load(state_dict, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=state_dict["model"], optim_state_dict=state_dict["optim"])
