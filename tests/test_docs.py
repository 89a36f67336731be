"""Links in the documents lead to files and headings that exist, code in them is code, and docs/index.md lists every page."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
import yaml

from tests.support.commands import REPOSITORY

PAGES = sorted(
    [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("benchmarks/**/*.md")],
    key=str,
)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
_BLOCK = re.compile(r"^[ ]*```(\w+)\n(.*?)^[ ]*```$", re.DOTALL | re.MULTILINE)


def links(text: str) -> list[str]:
    """Targets of the links outside of code blocks, but for those to other sites."""
    return [target for target in _LINK.findall(_CODE.sub("", text)) if "://" not in target]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", _CODE.sub("", text), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", h).lower()).replace(" ", "-") for h in headings
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in links(page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_code_is_code(page: Path) -> None:
    """YAML parses and Python compiles."""
    for language, block in _BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "yaml":
            list(yaml.safe_load_all(block))
        elif language == "python":
            compile(textwrap.dedent(block), str(page), "exec")


def test_the_index_lists_every_page() -> None:
    index = REPOSITORY / "docs" / "index.md"
    listed = set(links(index.read_text(encoding="utf-8")))
    assert {page.name for page in (REPOSITORY / "docs").glob("*.md")} - {"index.md"} <= listed


def test_symbols_that_the_architecture_names_exist() -> None:
    """In its "how to add" part, a name in backticks stands in a file that the same paragraph links to."""
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## How to add")[2]
    lacking = []
    for paragraph in text.split("\n\n"):
        files = [(REPOSITORY / "docs" / target).resolve() for target in links(paragraph)]
        code = "\n".join(file.read_text(encoding="utf-8") for file in files if file.suffix == ".py")
        for name in re.findall(r"`([A-Za-z_][\w.]*)`", paragraph):
            last = name.rpartition(".")[2]
            if not re.search(rf"\b{last}\b", code):
                lacking.append(name)
    assert not lacking
