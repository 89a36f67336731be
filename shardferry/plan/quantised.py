"""Keep the codes of quantised state and their scales together: a rank gets a part of both, cut between blocks, or an error.

::

    codes   8x4 of uint8    a scale for each 8 of them, in row-major order
    scales  4               rows 2:6 have scales 1:3; rows 2:5 end within a block
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch

from shardferry.checkpoint.catalog import SavedTensor
from shardferry.checkpoint.optimizer_state import SCALAR_STATE
from shardferry.layout.tensor_layout import TensorLayout
from shardferry.plan.state_of_param import Shape, StateOfParam
from shardferry.region import Region

CODE_DTYPES = frozenset({torch.uint8, torch.int8})
_CODES_PER_BYTE = (2, 4, 8)  # where several are packed into one
_MAX_TABLE = 256  # numbers that 8-bit codes can stand for


def part_of_scales(codes: Shape, scales: Shape, part: Region) -> Region | None:
    """The scales of one part of codes.

    Scales with as many dimensions as codes have one for each block of equal sizes; those with one dimension, for each block of
    elements in row-major order.

    Args:
        codes, scales: whole shapes.
        part: of the codes; may be empty.

    Returns:
        None: the part ends within a block, or it can't be told which scales are its.
    """
    if len(scales) == len(codes):
        return _divided(part, codes, scales)
    num_scales = math.prod(scales)
    is_by_column = num_scales in codes[1:] and num_scales != codes[0]
    is_rows = part.sizes[1:] == codes[1:]
    if len(scales) != 1 or is_by_column or not (is_rows or not part.numel):
        return None
    inner = math.prod(codes[1:])
    flat = Region((part.offsets[0] * inner,), (part.numel,))
    return _divided(flat, (math.prod(codes),), scales)


def _divided(part: Region, codes: Shape, scales: Shape) -> Region | None:
    offsets, sizes = [], []
    for offset, size, num_codes, num_scales in zip(part.offsets, part.sizes, codes, scales, strict=True):
        block, rest = divmod(num_codes, num_scales) if num_scales else (0, 1)
        if num_scales == 1:  # for all
            offset, size = 0, block if size else 0
        if rest or offset % block or size % block:
            return None
        offsets.append(offset // block)
        sizes.append(size // block)
    return Region(tuple(offsets), tuple(sizes))


class QuantisedEntries:
    """Which saved entries hold codes, and which may hold their scales.

    Args:
        params: by FQN.
        region_of: the box of one chunk of an entry.
    """

    def __init__(self, params: Mapping[str, StateOfParam], region_of: Callable[[SavedTensor, int], Region]) -> None:
        self._params = params
        self._region_of = region_of
        self._codes = {fqn: [name for name in param.entries if _is_codes(param, name)] for fqn, param in params.items()}

    def codes_of(self, fqn: str, name: str) -> str | None:
        """The codes whose scales an entry may hold; None: it holds none."""
        return next((codes for codes in self._codes[fqn] if name in self._scales(fqn, codes)), None)

    def scales_apart(self, fqn: str, name: str, layout: TensorLayout, *, is_param_cut: bool) -> str | None:
        """The entry that codes would be cut from; None where the codes can be loaded, or are no codes.

        Args:
            layout: of the entry that may hold codes, on this rank.
            is_param_cut: this rank holds a part of the parameter.

        Returns:
            A state name: of the scales, or that of the codes themselves where several are packed into a byte.
        """
        param = self._params[fqn]
        if name not in self._codes[fqn]:
            return None
        codes = param.entries[name]
        in_parts = layout.wanted_numel < math.prod(codes.shape) or len(codes.chunks) > 1
        if param.shape is None or codes.shape == param.shape:
            scales = self._scales(fqn, name) if in_parts else ()
            return next((other for other in scales if not self._go_together(fqn, codes, other, layout)), None)
        sizes = {math.prod(shape) for shape in (param.shape, *param.part_shapes)}
        is_packed = any(math.prod(codes.shape) * count in sizes for count in _CODES_PER_BYTE)
        return name if is_packed and (in_parts or is_param_cut) else None

    def _scales(self, fqn: str, codes: str) -> Iterator[str]:
        entries = self._params[fqn].entries
        return (
            name
            for name, saved in entries.items()
            if name not in SCALAR_STATE
            and saved.dtype.is_floating_point
            and saved.shape != entries[codes].shape
            and not self._is_table(name)
        )

    def _go_together(self, fqn: str, codes: SavedTensor, name: str, layout: TensorLayout) -> bool:
        """Whether a rank's part of codes can be told its part of an entry."""
        scales = self._params[fqn].entries[name]
        if len(scales.chunks) == 1 and len(codes.chunks) > 1:
            return False  # they are of all, or of one rank alone
        if math.prod(scales.shape) == 1:
            return True
        if len(layout.boxes) > 1 or (math.prod(scales.shape) <= _MAX_TABLE and not self._varies(name)):
            return False  # in pieces; or it may as well be a table
        if any(part_of_scales(codes.shape, scales.shape, box.region) is None for box in layout.boxes):
            return False
        parts = {part_of_scales(codes.shape, scales.shape, box) for box in self._chunks(codes)}
        return len(codes.chunks) == 1 or parts == set(self._chunks(scales))

    def _chunks(self, saved: SavedTensor) -> Iterator[Region]:
        return (box for chunk in saved.chunks if (box := self._region_of(saved, chunk)).numel)

    def _is_table(self, name: str) -> bool:
        """Whether an unsharded entry has one shape for parameters of several sizes: what codes stand for, not their scales."""
        having = [param for param in self._params.values() if name in param.entries]
        tables = {(param.entries[name].shape, len(param.entries[name].chunks)) for param in having}
        sizes = {math.prod(param.shape) for param in having if param.shape is not None}
        shape, num_chunks = next(iter(tables))
        return len(tables) == 1 and num_chunks == 1 and math.prod(shape) > 1 and len(sizes) > 1

    def _varies(self, name: str) -> bool:
        """Whether an entry has another shape for another parameter."""
        return len({param.entries[name].shape for param in self._params.values() if name in param.entries}) > 1


def _is_codes(param: StateOfParam, name: str) -> bool:
    saved = param.entries[name]
    return saved.dtype in CODE_DTYPES and name not in SCALAR_STATE and math.prod(saved.shape) > 1
