"""Boxes of saved tensors, read through any storage into an arena, without an optimizer around them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shardferry.arena import HostArena
from shardferry.checkpoint.catalog import Catalog
from shardferry.checkpoint.open import storage_of
from shardferry.config import ReadOptions
from shardferry.layout.tensor_layout import TensorLayout, single_box
from shardferry.plan.planner import plan_tensors
from shardferry.read.execute import read_plan
from shardferry.region import Region
from shardferry.stats import Counters
from shardferry.storage.base import RangeReader


def load_layouts(
    catalog: Catalog,
    wanted: Sequence[tuple[str, TensorLayout]],
    *,
    storage: RangeReader | None = None,
    concurrency: int = 4,
) -> tuple[list[torch.Tensor], Counters]:
    """The local tensor of each wanted key, as one rank loads them, and what was asked of storage."""
    plan, counters = plan_tensors(catalog, wanted, world_rank=0, world_size=1), Counters()
    arena, opened = HostArena(plan.arena_bytes), storage or storage_of(catalog)
    try:
        read_plan(plan, catalog, opened, arena, ReadOptions(concurrency=concurrency), counters)
    finally:
        opened.close()
    assert counters.bytes_done == plan.bytes_needed
    return [arena.tensor(t.arena_offset, t.layout.local_shape, t.dtype).clone() for t in plan.tensors], counters


def load_boxes(
    catalog: Catalog,
    wanted: Sequence[tuple[str, Region]],
    *,
    storage: RangeReader | None = None,
    concurrency: int = 4,
) -> tuple[list[torch.Tensor], Counters]:
    """Each wanted box of each wanted key; see `load_layouts`."""
    layouts = [(key, single_box(catalog.tensors[key].shape, region)) for key, region in wanted]
    return load_layouts(catalog, layouts, storage=storage, concurrency=concurrency)


def load_whole(catalog: Catalog) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by key."""
    wanted = [(key, Region.whole(saved.shape)) for key, saved in catalog.tensors.items()]
    found, _ = load_boxes(catalog, wanted)
    return dict(zip(catalog.tensors, found, strict=True))


def bits(tensor: torch.Tensor) -> bytes:
    """The elements, row-major: for comparisons that know no rounding, no NaN and no dtype."""
    packed = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    return packed.view(-1).view(torch.uint8).numpy().tobytes()
