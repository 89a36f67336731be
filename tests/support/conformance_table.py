"""Turn the results of marked tests into the table of docs/conformance.md. A pytest plugin: see scripts/conformance.

Tests say what they show by ``@pytest.mark.conformance(5)`` (a group) and ``@pytest.mark.defect("B1")`` (a defect of stock
torch). A test of a defect may add what stock torch does: ``record_property("stock", "8 of 16 values are wrong")``.
"""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

GROUPS = {
    1: "N ranks to M ranks, N and M of 1, 2, 3, 4, 5, 6, 8: all state is equal, bit for bit",
    2: "Exact plans: 8 to 4, 4 to 8, 4 to 3; a box over two chunks",
    3: "Uneven shards, more ranks than rows, tensors without elements, 0-dim and size-[1] parameters",
    4: "Rows to columns, one axis to two and back, every placement to every other, `_StridedShard`",
    5: "HSDP as source and as target",
    6: "TP × FSDP, data-parallel groups that don't begin with rank 0",
    7: "A hole is an error that names the FQN and the box",
    8: "An overlap is an error, never a guess",
    9: "A wrong key, no `planner_data`, flattened and nested keys, integer keys, param groups of pipeline stages",
    10: "`step` as a float, a 0-dim tensor, a size-[1] tensor; on the device where the optimizer wants it",
    11: "Another dtype is an error, or a cast where asked",
    12: "Strided and channels_last items",
    13: "fp8, bool, complex and every other dtype of torch",
    14: "Several files a rank, several shards of one FQN in one file",
    15: "Compressed items (zstd)",
    16: "Metadata of each rank on its own",
    17: "Metadata of torch 2.1 to 2.15",
    18: "A process group that isn't the whole job; ranks in another order than devices",
    19: "A fault on any rank in any phase: all ranks raise, none waits",
    20: "A cut file, a flipped bit",
    21: "Malicious metadata is refused, not run",
    22: "State that hasn't its parameter's shape: Adafactor, Shampoo",
}
DEFECTS = {
    "B1": "HSDP state is corrupted without an error",
    "B2": "TP × FSDP fails or hangs where the group isn't ranks 0 to n-1",
    "B3": "Holes are silent",
    "B4": "A wrong optimizer key gives an empty result",
    "B5": "A checkpoint without `planner_data` fails with a TypeError",
    "B6": "An empty local shard beside a list of param groups fails on all ranks",
    "B7": "Integer keys become strings; the state stays as it was",
    "B8": "A dtype that differs is cast without a word",
    "B9": "Leaves of other types become None in the caller's dict",
    "B10": "A view of a file seeks to the wrong place from its end",
    "B11": "A safetensors file beside an object can't be read; two shards of an FQN overwrite each other",
    "B12": "Flattened keys fail in two dimensions",
    "B13": "State gets the parameter's size, whatever its own",
    "B14": "The caller's planner is ignored in two dimensions; missing keys and sizes are not checked",
    "B15": "DTensors (FSDP2, TP) are not taken as sharded; several local shards fail",
    "B16": "State of a parameter of one element is taken for a scalar",
    "B17": "Strides of saved items stand in no metadata: a reader that assumes row-major is wrong",
    "B18": "Two loads in one process disturb each other",
    "B19": "The keys-only planner fails without `planner_data`, and allocates whole tensors",
}
MARKS = {"conformance", "defect"}


@dataclass
class Shown:
    """What the tests of one group or defect came to."""

    outcomes: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))  # by file::function
    stock: list[str] = field(default_factory=list)


class Recorder:
    """Collects outcomes while pytest runs, and writes the table at the end."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._shown: dict[str, Shown] = defaultdict(Shown)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        said = [str(value) for name, value in report.user_properties if name == "stock"]
        for label in sorted({str(value) for name, value in report.user_properties if name in MARKS}):
            shown = self._shown[label]
            shown.outcomes[report.nodeid.partition("[")[0]][report.outcome] += 1
            shown.stock += [text for text in said if text not in shown.stock]

    def pytest_sessionfinish(self) -> None:
        self._file.parent.mkdir(exist_ok=True)
        self._file.write_text(render(self._shown, torch.__version__.partition("+")[0]))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--conformance-table", metavar="FILE", type=Path, default=Path("docs/conformance.md"))


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # a worker of pytest-xdist sends its reports to the process that has none
        config.pluginmanager.register(Recorder(config.getoption("--conformance-table")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the reports of a test say what its marks say."""
    for item in items:
        item.user_properties += [(mark.name, mark.args[0]) for mark in item.iter_markers() if mark.name in MARKS]


def render(shown: Mapping[str, Shown], version: str) -> str:
    """The whole document."""
    groups = _table(((str(number), holds) for number, holds in GROUPS.items()), shown, version, "what must hold")
    defects = _table(DEFECTS.items(), shown, version, "what stock torch does wrong")
    return f"""# What holds, and which test shows it

Made by `scripts/conformance` from the results of the tests, with torch {version}. Don't edit: run it again.

## What must hold

{groups}

## Where stock torch is wrong

Each test shows stock torch failing, or that torch {version} has mended it, and Shardferry right.

{defects}
"""


def _table(rows: Iterable[tuple[str, str]], shown: Mapping[str, Shown], version: str, title: str) -> str:
    lines = [f"| | {title} | shown by | torch {version} |", "|---|---|---|---|"]
    lines += [
        f"| {label} | {text} | {_tests(shown.get(label))} | {_result(shown.get(label))} |" for label, text in rows
    ]
    return "\n".join(lines)


def _tests(shown: Shown | None) -> str:
    by_file: dict[str, list[str]] = defaultdict(list)
    for test, outcomes in sorted(shown.outcomes.items()) if shown else ():
        file, _, function = test.partition("::")
        by_file[file].append(f"`{function}`" + (f" × {outcomes.total()}" if outcomes.total() > 1 else ""))
    return "<br>".join(f"[{file}](../{file}): {', '.join(tests)}" for file, tests in by_file.items()) or "no test yet"


def _result(shown: Shown | None) -> str:
    if shown is None:
        return "–"
    outcomes = sum(shown.outcomes.values(), Counter())
    words = [f"{outcomes['passed']} of {outcomes.total()} hold"]
    words += [f"**{outcomes[bad]} {bad}**" for bad in ("failed", "skipped") if outcomes[bad]]
    return "; ".join(words) + "".join(f"<br>stock: {text}" for text in shown.stock)


Evidence = set[tuple[str, str]]  # group or defect, and a test file that shows it


def marks_in(root: Path) -> Evidence:
    """What the marks in the test files under ``root / "tests"`` say; nothing is imported or run."""
    files = sorted((root / "tests").rglob("test_*.py"))
    return {(label, str(file.relative_to(root))) for file in files for label in _labels_in(ast.parse(file.read_text()))}


def _labels_in(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"pytest.mark.{name}" for name in MARKS}:
            yield str(ast.literal_eval(node.args[0]))


def evidence_in(table: Path) -> Evidence:
    """What a table says."""
    rows = re.findall(r"^\| (\w+) \|(.*)$", table.read_text(), re.MULTILINE)
    return {(label, file) for label, row in rows for file in re.findall(r"\]\(\.\./(tests/[^)]+)\)", row)}
