"""Two runs side by side: rows of texts, for the terminal and for the page."""

from __future__ import annotations

from shardferry.pipeline.display import human_bytes, human_rate
from shardferry.schemas.stage_report import StageReport

HEADER = ("", "first", "second", "second / first")


def compared(first: StageReport, second: StageReport) -> list[tuple[str, str, str, str]]:
    """A row for each figure and each phase: its name, both values, and their ratio."""
    rows = [("finished", first.finished, second.finished, "")]
    for words, (name, unit) in _COMPARED.items():
        a, b = getattr(first, name), getattr(second, name)
        rows.append((words, unit(a), unit(b), _ratio(a, b)))
    for phase in dict.fromkeys([*first.phases, *second.phases]):
        a, b = first.phases.get(phase), second.phases.get(phase)
        rows.append((f"phase {phase}", _seconds(a), _seconds(b), _ratio(a, b)))
    return rows


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3f} s"


def _bytes(value: float | None) -> str:
    return "" if value is None else human_bytes(value)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,}"


def _rate(value: float | None) -> str:
    return "" if value is None else human_rate(value)


_COMPARED = {
    "ranks": ("world_size", _count),
    "in all": ("total_s", _seconds),
    "needed once": ("unique_bytes_needed", _bytes),
    "read": ("storage_bytes_read", _bytes),
    "read over needed": ("read_amplification", _number),
    "requests": ("num_requests", _count),
    "rate of the storage": ("storage_bytes_per_s", _rate),
    "over the lower bound": ("ratio_to_lower_bound", _number),
}


def _ratio(first: float | None, second: float | None) -> str:
    return f"{second / first:.3f}" if first and second is not None else ""
