"""What the project wants of every case on every kind of storage, and whether a case has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.floor import Floor
from benchmarks.ours import Cooperative, Direct, Shardferry
from benchmarks.run import Figures
from benchmarks.stock import StockLoad
from benchmarks.stores import StoreKind
from shardferry.config import ReadOptions

MAX_BYTES_RATIO = 1.02  # bytes asked of storage by all ranks over the unique needed ones, cooperative
MAX_FLOOR_RATIO = {StoreKind.WARM: 1.25, StoreKind.COLD: 1.10, StoreKind.THROTTLED: 1.10}  # wall time; touched
MAX_FRESH_FLOOR_RATIO = 1.1  # the same with destinations allocated by the load, page cache warm
MIN_STOCK_RATIO = {StoreKind.WARM: 3.5, StoreKind.COLD: 1.3, StoreKind.THROTTLED: 1.3}  # stock's wall time over ours
MIN_SHARE_OF_BYTES = 0.9  # the same on the throttled store: of stock's bytes over ours
MAX_AUTO_RATIO = 1.10  # wall time of auto over that of the better strategy
_SLACK_BYTES = 128 * 2**20  # of each rank's memory, beyond the shard and the budget of its reads


def max_peak_bytes() -> int:
    """Resident beyond the shard, per rank: the memory budget of the reads, and some slack."""
    return ReadOptions().memory_budget + _SLACK_BYTES


@dataclass(frozen=True, slots=True)
class Verdict:
    """One limit in one case."""

    what: str
    wanted: str
    found: str
    met: bool | None  # None: not measured

    def __str__(self) -> str:
        if self.met is None:
            return self.found
        return f"{self.found} {'ok' if self.met else 'missed'}"


def verdicts(kind: StoreKind, figures: Mapping[str, Figures]) -> list[Verdict]:
    """Each limit against the figures of one case, by contender; those that stock has a part in where it was measured."""
    ours, floor = figures[Shardferry.name], figures[Floor.name]
    together, direct = figures[Cooperative.name], figures[Direct.name]
    found = [_at_most("x floor", ours.wall_s / floor.wall_s, MAX_FLOOR_RATIO[kind])]
    if kind is StoreKind.WARM:
        found.append(_fresh(ours, floor))
    if StockLoad.name in figures:
        found += _against_stock(kind, ours, figures[StockLoad.name])
    peak = max(ours.peak_over_shard, together.peak_over_shard, direct.peak_over_shard) / 2**20
    return [
        *found,
        _at_most("bytes/unique, cooperative", together.bytes_ratio, MAX_BYTES_RATIO, digits=3),
        _at_most("auto/better", ours.wall_s / min(together.wall_s, direct.wall_s), MAX_AUTO_RATIO),
        _at_most("peak over shard, MiB", peak, max_peak_bytes() / 2**20, digits=0),
    ]


def _against_stock(kind: StoreKind, ours: Figures, stock: Figures) -> list[Verdict]:
    faster, fewer = stock.wall_s / ours.wall_s, stock.bytes_asked / max(ours.bytes_asked, 1)
    found = [_at_least("stock/ours", faster, MIN_STOCK_RATIO[kind])]
    if kind is StoreKind.THROTTLED:
        found.append(_at_least("of stock's bytes/ours", faster / fewer, MIN_SHARE_OF_BYTES))
    return found


def _fresh(ours: Figures, floor: Figures) -> Verdict:
    if ours.fresh_wall_s is None or floor.fresh_wall_s is None:
        return Verdict("fresh, x floor", f"<= {MAX_FRESH_FLOOR_RATIO:g}", "-", met=None)
    return _at_most("fresh, x floor", ours.fresh_wall_s / floor.fresh_wall_s, MAX_FRESH_FLOOR_RATIO)


def _at_most(what: str, found: float, limit: float, *, digits: int = 2) -> Verdict:
    return Verdict(what, f"<= {limit:g}", f"{found:.{digits}f}", found <= limit)


def _at_least(what: str, found: float, limit: float) -> Verdict:
    return Verdict(what, f">= {limit:g}", f"{found:.2f}", found >= limit)
