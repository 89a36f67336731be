"""Draw figures: for each kind of storage, times over the floor and bytes over the needed ones, a mark for each contender."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.contenders import CONTENDERS
from benchmarks.floor import Floor
from benchmarks.models import NUM_SMALL
from benchmarks.table import CaseResults, Results

_SHIFT = 0.07  # between the marks of one case
# Ours in one hue, stock in another, the others in greys; the shape tells what the hue doesn't.
_MARKS = {
    "floor": ("#000000", "_"),
    "Shardferry": ("#0b6e4f", "o"),
    "Shardferry, direct": ("#5bb98c", "^"),
    "Shardferry, cooperative": ("#5bb98c", "s"),
    "stock dcp.load": ("#c8553d", "o"),
    "stock load_sharded_optimizer_state_dict": ("#e39b86", "s"),
    "torch_checkpointing": ("#7b7b9d", "D"),
    "bytecheckpoint": ("#9a9ab8", "v"),
    "torchsnapshot": ("#b9b9cf", "P"),
}


def draw(results: Results, file: Path) -> None:
    """Write a picture. Raises ModuleNotFoundError where matplotlib isn't installed."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    style = {"svg.fonttype": "none", "svg.hashsalt": "shardferry", "font.size": 8, "axes.spines.top": False}
    with mpl.rc_context({**style, "axes.spines.right": False}):
        figure, rows = pyplot.subplots(len(results), 2, figsize=(14, 3.4 * len(results)), squeeze=False)
        for (kind, cases), (times, nbytes) in zip(results.items(), rows, strict=True):
            floors = {case: figures[Floor.name].wall_s for case, figures in cases.items()}
            _panel(times, cases, lambda case, found, floors=floors: found.wall_s / floors[case])
            times.set_title(f"time over the floor: {kind.title}", loc="left")
            _panel(nbytes, cases, lambda _, found: found.bytes_ratio)
            nbytes.set_title("bytes out of storage over needed ones", loc="left")
        handles = {
            label: mark for axes in figure.axes for mark, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=5, frameon=False)
        figure.tight_layout(rect=(0, 0.25 / len(results), 1, 1))
        figure.savefig(file, metadata={"Date": None})
        pyplot.close(figure)


def _panel(axes: Any, cases: CaseResults, value: Any) -> None:
    shown = [kind.name for kind in CONTENDERS if kind is not Floor]
    for place, name in enumerate(shown):
        found = [(x, value(case, figures[name])) for x, (case, figures) in enumerate(cases.items()) if name in figures]
        if found:
            colour, shape = _MARKS[name]
            shift = (place - (len(shown) - 1) / 2) * _SHIFT
            axes.plot(
                [x + shift for x, _ in found], [y for _, y in found], shape, color=colour, markersize=4.5, label=name
            )
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if f"{y:.0e}"[0] in "2 5" else "")
    axes.grid(axis="y", which="both", color="#e6e6e6", linewidth=0.5)
    axes.set_xticks(range(len(cases)), [_label(case) for case in cases])


def _label(case: Case) -> str:
    """Short enough for eleven of them side by side."""
    if case.model == "small":
        return f"{case.saved_by} × {NUM_SMALL}\nsmall"
    return case.title.replace(", rows → ", "\n")
