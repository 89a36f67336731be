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


def random_bits(shape: Sequence[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Every bit pattern of a dtype, NaNs too; of booleans only the two that there are."""
    generator = torch.Generator().manual_seed(seed)
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (num_bytes,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(tuple(shape))
