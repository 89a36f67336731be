"""The model that the programs train: a few steps of it are a few milliseconds, and its rows divide by no number of ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

DECAYED = {"lr": 0.03, "betas": (0.8, 0.95), "weight_decay": 0.25}
UNDECAYED = {"lr": 0.01, "weight_decay": 0.0}
OTHERS = {"lr": 9.0, "betas": (0.1, 0.2), "weight_decay": 9.0}  # of the optimizers that are loaded into


class Net(nn.Module):
    """Uneven shards on 2 and 3 ranks; a parameter with fewer rows than ranks."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Embedding(11, 6)
            self.up = nn.Linear(6, 7)
            self.norm = nn.LayerNorm(7)
            self.down = nn.Linear(7, 1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.down(self.norm(self.up(self.embed(tokens)).tanh()))


def loss_of(model: nn.Module, batch: int) -> torch.Tensor:
    """The loss on one of the batches, which are the same on all ranks."""
    tokens = torch.arange(12) * (batch + 3) % 11
    return model(tokens).square().mean()


def groups_of(model: nn.Module, *hyperparameters: dict[str, Any]) -> list[dict[str, Any]]:
    """Two param groups: matrices, and biases and the norm. By name: FSDP1 shows slices, whose shapes tell nothing."""
    split: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, parameter in model.named_parameters():
        split["norm" in name or name.endswith("bias")].append(parameter)
    return [{"params": params, **values} for params, values in zip(split, hyperparameters, strict=True)]
