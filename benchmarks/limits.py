"""What the project wants of every case, and whether a case has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.contenders import Floor, Shardferry, StockLoad
from benchmarks.run import Figures

MAX_BYTES_RATIO = 1.02  # bytes asked of storage by all ranks over the unique needed ones
MAX_FLOOR_RATIO = 1.25  # wall time over the floor's; page cache warm, destinations touched
MAX_FRESH_FLOOR_RATIO = 1.1  # the same with destinations allocated by the load
MIN_STOCK_RATIO = 3.5  # stock dcp.load's wall time over ours; page cache warm, destinations touched
MAX_PEAK_BYTES = 128 * 2**20  # resident beyond the shard, of each rank


@dataclass(frozen=True, slots=True)
class Verdict:
    """One limit in one case."""

    what: str
    wanted: str
    found: str
    met: bool

    def __str__(self) -> str:
        return f"{self.found} {'ok' if self.met else 'missed'}"


def verdicts(figures: Mapping[str, Figures]) -> list[Verdict]:
    """Each limit against the figures of one case, by contender."""
    ours, stock, floor = figures[Shardferry.name], figures[StockLoad.name], figures[Floor.name]
    over_floor, under_stock = ours.wall_s / floor.wall_s, stock.wall_s / ours.wall_s
    fresh = ours.fresh_wall_s / floor.fresh_wall_s
    bytes_ratio = ours.bytes_asked / ours.unique_bytes
    return [
        Verdict("over the floor", f"<= {MAX_FLOOR_RATIO:g}", f"{over_floor:.2f}", over_floor <= MAX_FLOOR_RATIO),
        Verdict("fresh, over it", f"<= {MAX_FRESH_FLOOR_RATIO:g}", f"{fresh:.2f}", fresh <= MAX_FRESH_FLOOR_RATIO),
        Verdict("stock over ours", f">= {MIN_STOCK_RATIO:g}", f"{under_stock:.2f}", under_stock >= MIN_STOCK_RATIO),
        Verdict("bytes/unique", f"<= {MAX_BYTES_RATIO:g}", f"{bytes_ratio:.3f}", bytes_ratio <= MAX_BYTES_RATIO),
        Verdict(
            "peak over shard, MiB",
            f"<= {MAX_PEAK_BYTES / 2**20:g}",
            f"{ours.peak_over_shard / 2**20:.0f}",
            ours.peak_over_shard <= MAX_PEAK_BYTES,
        ),
    ]
