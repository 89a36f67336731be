"""From which topology to which: the cases that are measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch.distributed.tensor import Replicate, Shard

from benchmarks.models import NUM_SMALL
from shardferry.layout.mesh import Mesh
from shardferry.layout.spec import SpecLayout
from shardferry.layout.tensor_layout import AxisCut, TensorLayout, shard_on_mesh

COPIES, AXIS = "copies", "dp"


@dataclass(frozen=True, slots=True)
class Case:
    """A model saved by FSDP2 on some ranks (rows), wanted on others.

    Of many small tensors there are 64 shares: each of 4 processes wants 16 that lie side by side, and reads what 16 ranks
    of an unchanged topology would read.
    """

    name: str
    saved_by: int  # ranks
    ranks: int
    cut: Literal["rows", "columns"]
    copies: int = 1  # HSDP: as many groups of ranks hold the same
    model: Literal["gpt", "small"] = "gpt"

    @property
    def title(self) -> str:
        change = "" if self.cut == "rows" else ", rows → columns"
        target = f"{self.ranks}" if self.copies == 1 else f"{self.copies} × {self.ranks // self.copies}"
        if self.model == "small":
            return f"{self.saved_by} ranks × {NUM_SMALL} small tensors"
        return f"{self.saved_by} → {target}{change}"

    @property
    def checkpoint(self) -> tuple[str, int]:
        """Model and saving ranks: cases that have these in common load the same checkpoint."""
        return self.model, self.saved_by

    @property
    def mesh_shape(self) -> tuple[int, int]:
        """Copies, and the ranks that share one."""
        return self.copies, self.ranks // self.copies

    def shard_dim(self, shape: tuple[int, ...]) -> int | None:
        """The dimension of a parameter that is cut; None: every rank holds all of it."""
        if self.cut == "rows":
            return 0
        return 1 if len(shape) > 1 else None

    def tensor_layout(self, shape: tuple[int, ...], world_rank: int) -> TensorLayout:
        """What one rank holds of one parameter."""
        dim, (copies, ranks) = self.shard_dim(shape), self.mesh_shape
        placement = Replicate() if dim is None else Shard(dim)
        copy, rank = divmod(world_rank, ranks)
        return shard_on_mesh(shape, [AxisCut(copies, copy, Replicate()), AxisCut(ranks, rank, placement)])

    def spec(self) -> SpecLayout:
        """The topology as a stage's spec would say it."""
        copies, ranks = self.mesh_shape
        mesh = Mesh(((COPIES, copies), (AXIS, ranks)))
        if self.cut == "rows":
            return SpecLayout(mesh, (), {AXIS: Shard(0)})
        return SpecLayout(mesh, (), {AXIS: Shard(1)})


CASES = (
    Case("4-4", 4, 4, "rows"),
    Case("4-2", 4, 2, "rows"),
    Case("4-3", 4, 3, "rows"),
    Case("4-6", 4, 6, "rows"),
    Case("4-8", 4, 8, "rows"),
    Case("1-4", 1, 4, "rows"),
    Case("rows-columns-2", 4, 2, "columns"),
    Case("rows-columns-4", 4, 4, "columns"),
    Case("rows-columns-8", 4, 8, "columns"),
    Case("hsdp-2x2", 4, 4, "rows", copies=2),
    Case("64-small", 64, 4, "rows", model="small"),
)
