"""Models' parameters and their AdamW state: names, shapes, and values that anybody can recompute."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from shardferry.region import Region, row_major_strides

STATES = ("exp_avg", "exp_avg_sq")
STEP = 7.0
LEARNING_RATE = 0.125
NUM_SMALL = 600  # tensors of the model of small ones
_SMALL_ROWS = 128  # two of them for each of 64 ranks
_EXACT = 2**24  # float32 holds every integer up to here
_BLOCK = 1 << 22  # elements that are computed at once


Shapes = Mapping[str, tuple[int, ...]]  # of the parameters, by FQN, in the order of the model


@dataclass(frozen=True, slots=True)
class GptSize:
    """The few numbers that make a GPT large or small."""

    width: int
    layers: int
    vocabulary: int
    context: int

    def shapes(self) -> Shapes:
        width = self.width
        shapes: dict[str, tuple[int, ...]] = {
            "wte.weight": (self.vocabulary, width),
            "wpe.weight": (self.context, width),
        }
        for layer in range(self.layers):
            block = f"h.{layer}"
            for norm in ("ln_1", "ln_2"):
                shapes |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
            for name, outputs, inputs in (
                ("attn.qkv", 3 * width, width),
                ("attn.proj", width, width),
                ("mlp.up", 4 * width, width),
                ("mlp.down", width, 4 * width),
            ):
                shapes |= {f"{block}.{name}.weight": (outputs, inputs), f"{block}.{name}.bias": (outputs,)}
        return shapes | {"ln_f.weight": (width,), "ln_f.bias": (width,)}


def state_bytes(shapes: Shapes) -> int:
    """Bytes of an optimizer's state: two float32 moments an element."""
    return 4 * len(STATES) * sum(math.prod(shape) for shape in shapes.values())


def gpt_of(megabytes: int) -> Shapes:
    """The GPT whose AdamW state comes nearest to so many megabytes (10**6 bytes), by its number of layers."""
    width = next(width for width, least in ((1024, 500), (512, 100), (256, 30), (64, 0)) if megabytes >= least)
    vocabulary = 32 * width
    gpts = [GptSize(width, layers, vocabulary, 1024).shapes() for layers in range(1, max(2, megabytes // 8))]
    return min(gpts, key=lambda shapes: abs(state_bytes(shapes) - megabytes * 10**6))


def small_tensors(megabytes: int) -> Shapes:
    """A model of many small parameters, whose moments are `NUM_SMALL` tensors; 64 ranks hold a few KiB of each."""
    width = max(1, megabytes * 10**6 // (NUM_SMALL * 4 * _SMALL_ROWS))
    shapes: dict[str, tuple[int, ...]] = {}
    for block in range(NUM_SMALL // len(STATES) // 2):
        shapes |= {f"blocks.{block}.weight": (_SMALL_ROWS, width), f"blocks.{block}.scale": (_SMALL_ROWS * width,)}
    return shapes


def fill_box(tensor: torch.Tensor, fqn: str, name: str, shape: Sequence[int], region: Region) -> None:
    """Write the values of one box of a whole tensor: positive integers, a function of FQN, state name and global index.

    Args:
        tensor: contiguous, of the region's sizes; filled in place.
        shape: of the whole tensor.
    """
    if not region.numel:
        return
    seed = zlib.crc32(f"{fqn}/{name}".encode())
    index = torch.zeros((), dtype=torch.int64)
    for dim, stride in list(enumerate(row_major_strides(shape)))[1:]:
        along = torch.arange(region.offsets[dim], region.offsets[dim] + region.sizes[dim], dtype=torch.int64) * stride
        index = index.unsqueeze(-1) + along  # of the elements of one row
    stride = row_major_strides(shape)[0]
    rows = max(1, _BLOCK // max(index.numel(), 1))
    for start in range(0, region.sizes[0], rows):
        stop = min(start + rows, region.sizes[0])
        first = torch.arange(region.offsets[0] + start, region.offsets[0] + stop, dtype=torch.int64) * stride
        values = first.view(-1, *(1,) * (len(shape) - 1)) + index
        values.mul_(2654435761).add_(seed).remainder_(_EXACT - 1).add_(1)
        tensor[start:stop] = values


def expected_state(boxes: Mapping[str, tuple[tuple[int, ...], Region]]) -> dict[tuple[str, str], torch.Tensor]:
    """What a rank must hold after a load: by FQN and state name.

    Args:
        boxes: by FQN, the whole shape and this rank's region.
    """
    expected: dict[tuple[str, str], torch.Tensor] = {}
    for fqn, (shape, region) in boxes.items():
        for name in STATES:
            expected[fqn, name] = torch.empty(region.sizes)
            fill_box(expected[fqn, name], fqn, name, shape, region)
    return expected
