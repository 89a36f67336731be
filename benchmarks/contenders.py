"""Who is measured, in the order of the tables: the floor, Shardferry, stock torch, and other systems of their own formats."""

from __future__ import annotations

from benchmarks.cases import Case
from benchmarks.floor import Floor
from benchmarks.others import ByteCheckpoint, TorchCheckpointing, TorchSnapshot
from benchmarks.ours import Cooperative, Direct, Shardferry
from benchmarks.stock import StockLoad, StockShardedLoad
from benchmarks.stores import StoreKind
from benchmarks.task import Contender

CONTENDERS: tuple[type[Contender], ...] = (
    Floor,
    Shardferry,
    Direct,
    Cooperative,
    StockLoad,
    StockShardedLoad,
    TorchCheckpointing,
    ByteCheckpoint,
    TorchSnapshot,
)


OURS: tuple[type[Contender], ...] = (Floor, Shardferry, Direct, Cooperative)


def contenders_of(case: Case, kind: StoreKind, *, ours_alone: bool = False) -> list[type[Contender]]:
    """Those that load a case from a kind of storage.

    Args:
        ours_alone: the floor and Shardferry.
    """
    return [contender for contender in (OURS if ours_alone else CONTENDERS) if not contender.why_not(case, kind)]
