"""Find each original parameter inside the flat parameters of FSDP1 (FullyShardedDataParallel).

No other file looks into FSDP1's private flat-parameter handles; tests/core/test_private_apis.py fails when torch
changes them. Source: torch/distributed/fsdp/_flat_param.py, FlatParamHandle and _ShardParamInfo.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed.fsdp import FullyShardedDataParallel

from shardferry.errors import LayoutError
from shardferry.layout.from_tensor import layout_of_placements
from shardferry.layout.tensor_layout import LocalRegion, TensorLayout, flat_slice
from shardferry.region import Region


@dataclass(frozen=True, slots=True)
class FlatPart:
    """The part of a flat tensor that belongs to one original parameter."""

    fqn: str  # with the wrappers' prefixes
    layout: TensorLayout
    position: int  # elements, from the start of the flat tensor
    aliases: tuple[str, ...] = ()  # other names of the same (tied) parameter


@dataclass(frozen=True)
class FlattenedParameter:
    """A tensor that an optimizer of an FSDP1 model may train: a flat parameter, or the slice of one original parameter."""

    tensor: torch.Tensor
    parts: tuple[FlatPart, ...]


def flattened_parameters(model: torch.nn.Module) -> Iterator[FlattenedParameter]:
    """All tensors of a model that FSDP1 has flattened; none for other models.

    Raises:
        LayoutError: FSDP1 has flattened a DTensor whose local tensor is several regions of the whole.
    """
    for prefix, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel) and module._handle is not None:
            yield from _parameters_of(module._handle, f"{prefix}." if prefix else "")


def _parameters_of(handle: Any, prefix: str) -> Iterator[FlattenedParameter]:
    """The flat parameter of one FSDP1 unit; or, with ``use_orig_params``, the original parameters' slices of it.

    Args:
        handle: a FlatParamHandle.
        prefix: of the names in the unit.
    """
    flat = handle.flat_param
    aliases = _aliases(flat)
    parts = [
        replace(
            _part(prefix + fqn, tuple(shape), info, extension),
            aliases=tuple(prefix + alias for alias in aliases.get(fqn, ())),
        )
        for fqn, shape, info, extension in zip(
            flat._fqns, flat._shapes, flat._shard_param_infos, flat._param_extensions, strict=True
        )
    ]
    if flat._params is None:  # use_orig_params=False
        yield FlattenedParameter(flat, tuple(parts))
        return
    for parameter, part in zip(flat._params, parts, strict=True):
        yield FlattenedParameter(parameter, (replace(part, position=0),))


def _aliases(flat: Any) -> dict[str, list[str]]:
    """The other names of tied parameters, by the name that FSDP1 has flattened them under."""
    aliases: dict[str, list[str]] = {}
    for shared in flat._shared_param_infos:
        first = _joined(shared.prim_module_name, shared.prim_param_name)
        aliases.setdefault(first, []).append(_joined(shared.module_name, shared.param_name))
    return aliases


def _joined(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def _part(fqn: str, shape: tuple[int, ...], info: Any, extension: Any) -> FlatPart:
    """One original parameter's part of a flat parameter.

    Args:
        shape: of the tensor that was flattened.
        info: a _ShardParamInfo.
        extension: the DTensorSpec of a parameter that was a DTensor (FSDP1 over TP), whose local tensor was flattened;
            else None.
    """
    start, numel, position = 0, 0, 0
    if info.in_shard:
        start, numel, position = info.intra_param_start_idx, info.numel_in_shard, info.offset_in_shard
    layout = flat_slice(shape, start=start, stop=start + numel)
    if extension is not None:
        mesh, placements, whole = extension.mesh, extension.placements, tuple(extension.shape)
        layout = _within(layout, layout_of_placements(mesh, placements, whole, shape, name=fqn), fqn)
    return FlatPart(fqn, layout, position)


def _within(flat: TensorLayout, local: TensorLayout, fqn: str) -> TensorLayout:
    """The layout of a slice of a flattened local tensor, which itself is one region of the whole.

    Args:
        flat: the slice in the local tensor.
        local: the local tensor in the whole.
    """
    if len(local.boxes) > 1:
        raise LayoutError(
            f"{fqn}: FSDP1 has flattened a tensor of {len(local.boxes)} boxes of the whole {local.global_shape}; "
            "only one box is supported, as TP by Shard makes it. Use FSDP2 (fully_shard)"
        )
    origin = local.boxes[0].region.offsets if local.boxes else (0,) * len(local.global_shape)
    boxes = (LocalRegion(Region(_sum(box.region.offsets, origin), box.region.sizes), box.local) for box in flat.boxes)
    return TensorLayout(local.global_shape, flat.local_shape, tuple(boxes))


def _sum(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip(one, other, strict=True))
