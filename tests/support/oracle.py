"""Values that are a known function of (FQN, state name, global index): any element found anywhere can be checked."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch

_EXACT = {torch.float32: 2**24, torch.float64: 2**30, torch.bfloat16: 2**8, torch.float16: 2**11, torch.int64: 2**30}


def full_tensor(fqn: str, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The whole tensor. Every value is a positive integer that the dtype holds exactly."""
    seed = zlib.crc32(f"{fqn}/{name}".encode())
    index = torch.arange(math.prod(shape), dtype=torch.int64)
    values = (index * 2654435761 + seed) % (_EXACT[dtype] - 1) + 1
    return values.to(dtype).view(tuple(shape))
