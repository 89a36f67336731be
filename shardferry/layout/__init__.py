"""Compute which regions of each tensor a rank holds, from the spec of a target topology or from live tensors."""

from __future__ import annotations

from shardferry.layout.from_tensor import (
    dtensor_placements,
    layout_of_placements,
    layout_of_tensor,
    shard_left_to_right,
    strided_shard,
)
from shardferry.layout.live import LiveEntry, LiveLayout
from shardferry.layout.mesh import Mesh, parse_placement, sharded_dim
from shardferry.layout.rank_layout import RankLayout
from shardferry.layout.spec import HeldBy, MeshBoxes, Rule, SpecLayout, SpecRank, ranks_at, spec_of
from shardferry.layout.tensor_layout import (
    AxisCut,
    LocalRegion,
    TensorLayout,
    flat_range,
    flat_slice,
    replicated,
    shard_on_mesh,
    single_box,
)

__all__ = [
    "AxisCut",
    "HeldBy",
    "LiveEntry",
    "LiveLayout",
    "LocalRegion",
    "Mesh",
    "MeshBoxes",
    "RankLayout",
    "Rule",
    "SpecLayout",
    "SpecRank",
    "TensorLayout",
    "dtensor_placements",
    "flat_range",
    "flat_slice",
    "layout_of_placements",
    "layout_of_tensor",
    "parse_placement",
    "ranks_at",
    "replicated",
    "shard_left_to_right",
    "shard_on_mesh",
    "sharded_dim",
    "single_box",
    "spec_of",
    "strided_shard",
]
