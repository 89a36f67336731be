"""Carry out a plan's reads on numbers instead of files: what would be where in a rank's memory."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.lib.stride_tricks import as_strided

from shardferry.checkpoint.catalog import Catalog
from shardferry.layout.tensor_layout import TensorLayout
from shardferry.plan.load_plan import LoadPlan, PlannedTensor
from shardferry.region import Region

NOTHING = -1


def simulate(plan: LoadPlan, catalog: Catalog, whole: Callable[[PlannedTensor], np.ndarray]) -> list[np.ndarray]:
    """The memory of each of the plan's tensors after its reads; `NOTHING` where none arrived.

    Args:
        whole: the whole tensor that was saved, as numbers that aren't negative.

    Fails where two reads, or two elements of one, arrive at one place.
    """
    memories = [np.full(tensor.layout.local_numel, NOTHING, dtype=np.int64) for tensor in plan.tensors]
    arrived = [0] * len(memories)
    for item in plan.reads:
        tensor, memory = plan.tensors[item.tensor], memories[item.tensor]
        chunk = whole(tensor)[_slices(catalog.region(catalog.tensors[tensor.key], item.chunk))]
        strides = [stride * memory.itemsize for stride in item.copy.strides]
        as_strided(memory[item.copy.offset :], item.copy.source.sizes, strides)[...] = chunk[_slices(item.copy.source)]
        arrived[item.tensor] += item.copy.source.numel
    for tensor, memory, count in zip(plan.tensors, memories, arrived, strict=True):
        assert np.count_nonzero(memory != NOTHING) == count, f"{tensor.key}: filled twice"
    return memories


def _slices(region: Region) -> tuple[slice, ...]:
    return tuple(slice(start, end) for start, end in zip(region.offsets, region.ends, strict=True))


def expected(layout: TensorLayout) -> np.ndarray:
    """What the local tensor should hold, by the layout's boxes alone."""
    whole = np.arange(math.prod(layout.global_shape)).reshape(layout.global_shape)
    local = np.full(layout.local_shape, -1)
    for box in layout.boxes:
        content = whole[tuple(map(slice, box.region.offsets, box.region.ends))]
        local[tuple(map(slice, box.local.offsets, box.local.ends))] = content.reshape(box.local.sizes)
    return local.reshape(-1)
