"""Where FSDP1 (FullyShardedDataParallel) keeps each parameter inside its flat ones.

The only place that looks into FSDP1's private flat-parameter handles; tests/core/test_private_apis.py fails when torch
changes them. Source: torch/distributed/fsdp/_flat_param.py, FlatParamHandle and _ShardParamInfo.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.fsdp import FullyShardedDataParallel

from shardferry.layout import TensorLayout, flat_slice


@dataclass(frozen=True, slots=True)
class FlatPart:
    """What a flat tensor holds of one original parameter."""

    fqn: str  # with the wrappers' prefixes
    layout: TensorLayout
    position: int  # elements, in the flat tensor


@dataclass(frozen=True)
class FlattenedParameter:
    """A tensor that an optimizer of an FSDP1 model may train: a flat parameter, or one original parameter's slice of it."""

    tensor: torch.Tensor
    parts: tuple[FlatPart, ...]


def flattened_parameters(model: torch.nn.Module) -> Iterator[FlattenedParameter]:
    """All tensors of a model that FSDP1 has flattened; none for other models."""
    for prefix, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel) and module._handle is not None:
            yield from _of_handle(module._handle, f"{prefix}." if prefix else "")


def _of_handle(handle: Any, prefix: str) -> Iterator[FlattenedParameter]:
    flat = handle.flat_param
    parts = [
        FlatPart(prefix + fqn, *_slice(shape, info))
        for fqn, shape, info in zip(flat._fqns, flat._shapes, flat._shard_param_infos, strict=True)
    ]
    if flat._params is None:
        yield FlattenedParameter(flat, tuple(parts))
        return
    for parameter, part in zip(flat._params, parts, strict=True):
        yield FlattenedParameter(parameter, (FlatPart(part.fqn, part.layout, 0),))


def _slice(shape: Any, info: Any) -> tuple[TensorLayout, int]:
    if not info.in_shard:
        return flat_slice(tuple(shape), start=0, stop=0), 0
    start = info.intra_param_start_idx
    return flat_slice(tuple(shape), start=start, stop=start + info.numel_in_shard), info.offset_in_shard
