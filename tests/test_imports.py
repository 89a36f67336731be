"""Tests import no other tests, and benchmarks import no tests: each can be changed without the others.

Tests do import the benchmarks' makers of large models and saves, so that these are written once.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.commands import REPOSITORY

# In text, so that programs which a test runs in another process count too.
_ANOTHER_TEST = re.compile(r"\b(?:from|import)\s+tests\.(?:\w+\.)*test_\w+")
_TESTS = re.compile(r"\b(?:from|import)\s+tests\b|-m\W+tests\b")


def sources(folder: str) -> list[Path]:
    """The Python files below a folder."""
    return sorted((REPOSITORY / folder).rglob("*.py"))


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [("tests", _ANOTHER_TEST), ("benchmarks", _TESTS)],
    ids=["tests import no tests", "benchmarks import no tests"],
)
def test_imports(folder: str, forbidden: re.Pattern[str]) -> None:
    files = sources(folder)
    assert len(files) > 20, "they are elsewhere"
    found = [
        f"{file.relative_to(REPOSITORY)}: {match[0]}"
        for file in files
        for match in forbidden.finditer(file.read_text(encoding="utf-8"))
    ]
    assert not found
