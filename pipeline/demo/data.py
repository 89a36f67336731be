"""Batches of the demo's text, as a pure function of the step and the rank."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import torch

GLOBAL_BATCH = 16  # sequences per step, over all ranks


@cache
def corpus() -> torch.Tensor:
    """The text as bytes, uint8 (length,)."""
    text = (files("shardferry.pipeline.demo") / "corpus.txt").read_bytes()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def batch(step: int, *, context: int, world_rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of a step's batch: tokens and next tokens, both int64 (GLOBAL_BATCH / world_size, context)."""
    text = corpus()
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - context - 1, (GLOBAL_BATCH,), generator=generator)
    own = starts.view(world_size, -1)[world_rank].tolist()
    windows = torch.stack([text[start : start + context + 1] for start in own]).long()
    return windows[:, :-1], windows[:, 1:]
