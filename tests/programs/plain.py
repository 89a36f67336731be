"""A plain model and one optimizer in this process, loaded from what a program saved."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import shardferry
from tests.programs.net import OTHERS, groups_of
from tests.programs.whole_state import WholeState, whole_state


def load_into_plain(
    model: nn.Module,
    checkpoint: Path,
    optimizer_key: str,
    *,
    optimizer_class: type[torch.optim.Adam] = torch.optim.AdamW,
) -> WholeState:
    """Load on one rank; what the optimizer then has in memory."""
    optimizer = optimizer_class(groups_of(model, OTHERS, OTHERS))
    shardferry.load_optimizer_state(model, optimizer, checkpoint, optimizer_key=optimizer_key)
    return whole_state(model, optimizer)
