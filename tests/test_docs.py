"""Links in the documents lead to files and headings that exist, code in them is code, and every page, name and error class has its place."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
import yaml

import shardferry
from shardferry import errors, pipeline, schemas
from tests.support.commands import REPOSITORY
from tests.support.documents import PAGES

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


def test_the_index_and_the_site_list_every_page() -> None:
    docs = REPOSITORY / "docs"
    pages = {page.relative_to(docs).as_posix() for page in docs.glob("**/*.md")} - {"index.md"}
    assert pages <= set(links((docs / "index.md").read_text(encoding="utf-8")))
    assert pages <= set(
        re.findall(r": (\S+\.md)$", (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    )


def test_excerpts_are_from_the_programs() -> None:
    """A block that begins with ``# examples/x.py`` has lines of that program alone; ``...`` stands for others, and spaces don't count."""
    lacking = []
    for page in PAGES:
        for _, block in _BLOCK.findall(page.read_text(encoding="utf-8")):
            first, *rest = block.splitlines() or [""]
            if re.fullmatch(r"# examples/\w+\.py", first):
                program = "".join((REPOSITORY / first[2:]).read_text(encoding="utf-8").split())
                lacking += [
                    (page.name, line) for line in rest if line.strip() != "..." and "".join(line.split()) not in program
                ]
    assert not lacking


def test_the_api_page_has_every_public_name() -> None:
    text = (REPOSITORY / "docs" / "api.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
    public = {f"{module.__name__}.{name}" for module in (shardferry, pipeline, schemas) for name in module.__all__}
    assert "shardferry.errors" in shown
    assert public - {f"shardferry.{name}" for name in vars(errors)} <= shown


def test_each_error_class_has_a_section() -> None:
    text = (REPOSITORY / "docs" / "errors.md").read_text(encoding="utf-8")
    classes = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert set(re.findall(r"^## `(\w+)`$", text, re.MULTILINE)) == classes - {"ShardferryError"}


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
