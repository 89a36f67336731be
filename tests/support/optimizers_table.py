"""Turn the outcomes of tests/optimizers into docs/optimizers.md. A pytest plugin: see scripts/zoo."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import astuple
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from tests.optimizers.table import WRAPPERS, Outcome

_MAX_WORDS = 280
_SAID = {
    "right": "right",
    "rounded": "right, rounded",
    "refused": "refused",
    "cannot": "torch can't",
    "wrong": "**wrong**",
}
_REMARKS = {
    "torchao": "Its step is compiled, but under FSDP2, where the compiled one fails on shards of several sizes.",
}

Outcomes = Mapping[str, Mapping[str, Mapping[str, Outcome]]]  # by library, optimizer and wrapper


class Recorder:
    """Collects outcomes while pytest runs, and writes the tables at the end.

    Args:
        file: of the tables.
        earlier: outcomes of earlier runs, as JSON; those of this run take their place. Runs of parts make one table so.
    """

    def __init__(self, file: Path, earlier: Path | None) -> None:
        self._file, self._earlier = file, earlier
        self._found: dict[str, dict[str, dict[str, Outcome]]] = defaultdict(lambda: defaultdict(dict))
        if earlier is not None and earlier.exists():
            for library, optimizers in json.loads(earlier.read_text()).items():
                for optimizer, by in optimizers.items():
                    self._found[library][optimizer] = {wrapper: Outcome(*outcome) for wrapper, outcome in by.items()}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties if report.when == "call" else ():
            if name == "optimizers":
                library, wrapper, outcomes = value  # type: ignore[misc]
                for optimizer, outcome in outcomes.items():
                    self._found[library][optimizer][wrapper] = Outcome(*outcome)

    def pytest_sessionfinish(self) -> None:
        self._file.write_text(render(self._found), encoding="utf-8")
        if self._earlier is not None:
            self._earlier.write_text(json.dumps(self._found, default=astuple))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--optimizers-table", metavar="FILE", type=Path, required=True)
    parser.addoption("--optimizers-outcomes", metavar="FILE", type=Path)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(
        Recorder(config.getoption("--optimizers-table"), config.getoption("--optimizers-outcomes"))
    )


def render(found: Outcomes) -> str:
    """The whole document."""
    notes: dict[str, int] = {}
    parts = [_section(library, optimizers, notes) for library, optimizers in found.items()]
    words = "\n".join(f"{number}. {text.replace('](', '] (')}" for text, number in notes.items())
    return f"""# Which optimizers load

Made from the results of `tests/optimizers`; the sections are the libraries that were run. `scripts/zoo` runs six others too. Don't edit.

Each optimizer trains under a wrapper, saves with `dcp.save`, and a fresh one and one that has stepped load that, on as many ranks as the
column says. The uninterrupted run is the oracle.

- **right**: weights, state, hyperparameters and the next step are bitwise those of the uninterrupted run.
- **right, rounded**: the next step differs by rounding: it sums over another number of ranks, or over another order in memory.
- **refused**: an error says so, and nothing was changed.
- **torch can't**: the optimizer doesn't step under this wrapper, torch doesn't save all of its state, or its own `load_state_dict` doesn't bring it back.

A number stands for the words, which are [below](#words).

{"".join(parts)}## Words

{words}
"""


def _section(library: str, optimizers: Mapping[str, Mapping[str, Outcome]], notes: dict[str, int]) -> str:
    tried = {name: by for name, by in optimizers.items() if _trains(by)}
    rows = [f"| {name} | {' | '.join(_cell(by.get(w.name), notes) for w in WRAPPERS)} |" for name, by in tried.items()]
    untried = [
        f"- {name}: {_shortened(by[WRAPPERS[0].name].words)}" for name, by in optimizers.items() if name not in tried
    ]
    header = f"| optimizer | {' | '.join(w.name for w in WRAPPERS)} |\n|---|{'---|' * len(WRAPPERS)}"
    text = f"## {library}{_version(library)}\n\n"
    text += f"{_REMARKS[library]}\n\n" if library in _REMARKS else ""
    text += "\n".join([header, *rows]) + "\n\n" if rows else ""
    return text + ("Not tried, as they don't train here:\n\n" + "\n".join(untried) + "\n\n" if untried else "")


def _trains(by_wrapper: Mapping[str, Outcome]) -> bool:
    plain = by_wrapper.get(WRAPPERS[0].name)
    return plain is None or plain.verdict != "cannot" or "bring back" in plain.words


def _cell(outcome: Outcome | None, notes: dict[str, int]) -> str:
    if outcome is None:
        return "–"
    if not outcome.words:
        return _SAID[outcome.verdict]
    return f"{_SAID[outcome.verdict]} ({notes.setdefault(_shortened(outcome.words), len(notes) + 1)})"


def _shortened(words: str) -> str:
    """Without what differs from case to case after the first sentences."""
    text = words if len(words) <= _MAX_WORDS else words[:_MAX_WORDS].rpartition(" ")[0] + " …"
    return text.replace("|", "\\|").replace("<", "\\<")


def _version(library: str) -> str:
    try:
        return f" {version(library.partition('.')[0]).partition('+')[0]}"
    except PackageNotFoundError:
        return ""
