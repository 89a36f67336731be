"""From which topology to which: the cases that are measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shardferry.layout import AxisCut, TensorLayout, sharded
from shardferry.mesh import Mesh, Replicate, Shard
from shardferry.spec_layout import Rule, SpecLayout

AXIS = "dp"


@dataclass(frozen=True, slots=True)
class Case:
    """Saved by FSDP2 on some ranks (rows), wanted on others."""

    name: str
    saved_by: int  # ranks
    ranks: int
    cut: Literal["rows", "columns"]

    @property
    def title(self) -> str:
        return (
            f"{self.saved_by} → {self.ranks}"
            if self.cut == "rows"
            else f"{self.saved_by} → {self.ranks}, rows → columns"
        )

    def shard_dim(self, shape: tuple[int, ...]) -> int | None:
        """The dimension of a parameter that is cut; None: every rank holds all of it."""
        if self.cut == "rows":
            return 0
        return 1 if len(shape) > 1 else None

    def tensor_layout(self, shape: tuple[int, ...], world_rank: int) -> TensorLayout:
        """What one rank holds of one parameter."""
        dim = self.shard_dim(shape)
        placement = Replicate() if dim is None else Shard(dim)
        return sharded(shape, [AxisCut(self.ranks, world_rank, placement)])

    def spec(self) -> SpecLayout:
        """The topology as a stage's spec would say it."""
        mesh = Mesh(((AXIS, self.ranks),))
        if self.cut == "rows":
            return SpecLayout(mesh, (), {AXIS: Shard(0)})
        return SpecLayout(mesh, (Rule("*.bias", {}), Rule("*ln_?.weight", {})), {AXIS: Shard(1)})


CASES = (
    Case("4-4", 4, 4, "rows"),
    Case("4-2", 4, 2, "rows"),
    Case("4-3", 4, 3, "rows"),
    Case("2-4", 2, 4, "rows"),
    Case("rows-columns-2", 4, 2, "columns"),
    Case("rows-columns-4", 4, 4, "columns"),
)
