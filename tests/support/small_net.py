"""Three linear layers and AdamW, on one rank: for tests of what fits by name, and of where a checkpoint is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from tests.support.alone import save_alone
from tests.support.oracle import full_tensor

NAMES = ("first", "second", "third")
Stepped = tuple[nn.Module, torch.optim.Optimizer]


class Net(nn.Module):
    """Three layers under the given names."""

    def __init__(self, names: Sequence[str] = NAMES, width: int = 4) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(width, 3))


def adamw(model: nn.Module, lr: float = 0.5, **options: Any) -> torch.optim.Optimizer:
    """Weights and biases in two groups."""
    named = dict(model.named_parameters())
    groups = [[p for n, p in named.items() if n.endswith(suffix)] for suffix in ("weight", "bias")]
    return torch.optim.AdamW(
        [{"params": group, "lr": lr * place} for place, group in enumerate(groups, start=1) if group], **options
    )


def fill(model: nn.Module, optimizer: torch.optim.Optimizer, rename: Callable[[str], str] = str) -> Stepped:
    """AdamW state from the oracle."""
    for fqn, parameter in model.named_parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(7.0),
            **{name: full_tensor(rename(fqn), name, parameter.shape) for name in ("exp_avg", "exp_avg_sq")},
        }
    return model, optimizer


def check(model: nn.Module, optimizer: torch.optim.Optimizer, saved_name: Callable[[str], str] = str) -> None:
    """The state is the oracle's, of the parameters under their saved names."""
    for fqn, parameter in model.named_parameters():
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[parameter][name], full_tensor(saved_name(fqn), name, parameter.shape)), (
                fqn
            )


def save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, **more: Any) -> str:
    save_alone(
        {"optim": get_optimizer_state_dict(model, optimizer), "model": get_model_state_dict(model), **more}, path
    )
    return str(path)
