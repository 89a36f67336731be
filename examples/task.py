"""What the examples train: a small network, its optimizer, and data that depend on the step alone."""

from __future__ import annotations

import torch
from torch import nn

BATCH = 48  # rows of all ranks together
WIDTH = 64


def network() -> nn.Module:
    """The same on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 256), nn.Tanh(), nn.Linear(256, WIDTH))


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3)


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, step: int, *, rank: int = 0, world_size: int = 1
) -> float:
    """Train on this rank's rows of the step's batch. Returns their loss before the step."""
    loss = _loss(model, _batch(step)[rank::world_size])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


@torch.no_grad()
def held_out_loss(model: nn.Module) -> float:
    """The loss on rows that no step trains on."""
    return float(_loss(model, _batch(-1)))


def _batch(step: int) -> torch.Tensor:
    return torch.rand(BATCH, WIDTH, generator=torch.Generator().manual_seed(1000 + step)) * 2 - 1


def _loss(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    return (model(rows) - rows.sin()).square().mean()
