"""docs/conformance.md says what the marks say: it is made from the results of the marked tests."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.support.conformance_table import DEFECTS, GROUPS, Shown, evidence_in, marks_in, render

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def test_the_committed_table_has_all_that_is_marked() -> None:
    marked, written = marks_in(REPOSITORY), evidence_in(REPOSITORY / "docs" / "conformance.md")
    assert marked == written, (
        f"run scripts/conformance: {sorted(marked ^ written)} stand in one of marks and table only"
    )


def test_each_group_and_each_defect_has_a_test() -> None:
    assert {label for label, _ in marks_in(REPOSITORY)} == {*map(str, GROUPS), *DEFECTS}


def test_a_failure_stands_in_the_table(tmp_path: Path) -> None:
    """What is written is what is read back; a test that fails is not hidden among those that hold."""
    shown = Shown()
    shown.outcomes["tests/core/test_one.py::test_holes"] = Counter(passed=3, failed=1)
    shown.stock.append("the hole is silent")
    text = render({"7": shown, "B3": shown}, "2.13.0")
    assert "| 3 of 4 hold; **1 failed**<br>stock: the hole is silent |" in text
    (tmp_path / "conformance.md").write_text(text)
    assert evidence_in(tmp_path / "conformance.md") == {
        ("7", "tests/core/test_one.py"),
        ("B3", "tests/core/test_one.py"),
    }
