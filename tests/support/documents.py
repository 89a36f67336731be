"""The pages of the documents."""

from __future__ import annotations

from tests.support.commands import REPOSITORY

PAGES = sorted(
    [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md"), *REPOSITORY.glob("benchmarks/**/*.md")],
    key=str,
)
