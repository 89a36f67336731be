"""Stock saves by a process on its own."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp


def item_of(value: Any) -> bytes:
    """A value as torch.save writes it, which is how a checkpoint's file holds it."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def save_alone(state_dict: dict[str, Any], path: Path | str, **options: Any) -> None:
    """``dcp.save`` without a process group, which torch remarks on each time."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        dcp.save(state_dict, checkpoint_id=str(path), **options)
