"""A plain model and one optimizer in this process, loaded from what a program saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

import shardferry
from tests.programs.net import OTHERS, Net, groups_of
from tests.programs.whole_state import WholeState, whole_state


def load_into_plain(
    checkpoint: Path,
    optimizer_key: str,
    *,
    rename: Mapping[str, str] | None = None,
    optimizer_class: type[torch.optim.Adam] = torch.optim.AdamW,
) -> WholeState:
    """Load on one rank; what the optimizer then has in memory."""
    model = Net(1)
    optimizer = optimizer_class(groups_of(model, OTHERS, OTHERS))
    shardferry.load_optimizer_state(model, optimizer, checkpoint, optimizer_key=optimizer_key, rename=rename)
    return whole_state(model, optimizer)
