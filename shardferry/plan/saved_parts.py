"""Find saved state that no rank can be given a part of: one rank's part under the whole's name, codes apart from their scales.

::

    parameter 8x4 on 2 ranks   exp_avg 4x4 in one chunk         the moments of one rank; the other's were not saved
    parameter 8x4 on 2 ranks   codes 8x4, scales of 2 elements  a scale belongs to 16 elements of codes: of which rank?
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from shardferry.checkpoint.catalog import SavedTensor
from shardferry.checkpoint.optimizer_state import SCALAR_STATE

Shape = tuple[int, ...]

CODE_DTYPES = frozenset({torch.uint8, torch.int8})
_CODES_PER_BYTE = (2, 4, 8)  # where several are packed into one


@dataclass(frozen=True, slots=True)
class StateOfParam:
    """The saved state of one parameter, and what is known of the parameter."""

    entries: Mapping[str, SavedTensor]  # by state name
    shape: Shape | None  # of the whole parameter; None: not known
    part_shapes: frozenset[Shape]  # smaller ones, that ranks hold now or held when the weight was saved


def local_part_names(params: Mapping[str, StateOfParam]) -> frozenset[str]:
    """The state names under which one rank's part was saved as if it were the whole.

    A factor may happen to have the shape of a rank's part. So a name counts only where each parameter that is sharded has one
    chunk of such a shape under it.

    Args:
        params: by FQN.
    """
    parts: set[str] = set()
    others: set[str] = set(SCALAR_STATE)
    for param in params.values():
        if param.part_shapes:
            for name, saved in param.entries.items():
                is_part = len(saved.chunks) == 1 and saved.shape != param.shape and saved.shape in param.part_shapes
                (parts if is_part else others).add(name)
    return frozenset(parts - others)


def scales_apart(
    params: Mapping[str, StateOfParam], fqn: str, name: str, *, is_cut: bool, is_param_cut: bool
) -> str | None:
    """The entry that codes of quantised state would be cut from; None where the codes can be loaded, or are no codes.

    Args:
        params: by FQN.
        fqn, name: of the entry that may hold codes.
        is_cut: this rank wants a part of the entry.
        is_param_cut: this rank holds a part of the parameter.

    Returns:
        A state name: of the scales, or that of the codes themselves where several are packed into a byte.
    """
    param = params[fqn]
    codes = param.entries[name]
    if codes.dtype not in CODE_DTYPES or name in SCALAR_STATE or math.prod(codes.shape) < 2:
        return None
    in_parts = is_cut or len(codes.chunks) > 1
    if param.shape is None or codes.shape == param.shape:
        scales = (
            other for other, saved in param.entries.items() if other not in SCALAR_STATE and _is_plain(saved, codes)
        )
        return next((other for other in scales if not _is_table(params, other)), None) if in_parts else None
    sizes = {math.prod(shape) for shape in (param.shape, *param.part_shapes)}
    is_packed = any(math.prod(codes.shape) * count in sizes for count in _CODES_PER_BYTE)
    return name if is_packed and (in_parts or is_param_cut) else None


def _is_plain(saved: SavedTensor, codes: SavedTensor) -> bool:
    """Whether an entry beside codes may hold their scales, saved whole or by one rank."""
    numel = math.prod(saved.shape)
    # One scale for all of a tensor serves each part, unless each rank had its own.
    return (
        len(saved.chunks) == 1
        and saved.shape != codes.shape
        and saved.dtype.is_floating_point
        and (numel > 1 or len(codes.chunks) > 1)
    )


def _is_table(params: Mapping[str, StateOfParam], name: str) -> bool:
    """Whether an entry has one shape for parameters of several sizes: what codes stand for, not their scales."""
    having = [param for param in params.values() if name in param.entries]
    shapes, sizes = {param.entries[name].shape for param in having}, {param.shape for param in having}
    return len(shapes) == 1 and math.prod(shapes.pop()) > 1 and len({math.prod(s) for s in sizes if s is not None}) > 1
