"""Blocks of the documents that no test runs (they need a store, a cluster or names of the reader's own) are checked: commands are
parsed, calls have arguments that exist, specs are specs, and named programs are there.
"""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

import shardferry
from shardferry import pipeline, schemas
from shardferry.pipeline.cli import app
from tests.support.commands import REPOSITORY
from tests.support.documents import PAGES

_BLOCK = re.compile(r"^[ ]*```(\w+)\n(.*?)^[ ]*```$", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"`shardferry ([^`]+)`")
_COMMANDS: Any = get_command(app)
_PLACES = (shardferry, pipeline, schemas)  # of public names
# Methods that blocks call on a name of the reader's own.
_METHODS = {"stage": pipeline.OptimizerLoadStage, "loading": pipeline.Loading}


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """Page and text of each block of a language."""
    for page in PAGES:
        for found, block in _BLOCK.findall(page.read_text(encoding="utf-8")):
            if found == language:
                yield str(page.relative_to(REPOSITORY)), textwrap.dedent(block)


def console_lines() -> list[str]:
    return [
        command
        for _, block in blocks("console")
        for command in re.findall(r"^\$ (.*?)(?:\s+#.*)?$", block, re.MULTILINE)
    ]


def commands_shown() -> list[str]:
    """The command lines of Shardferry in console blocks, in the help, and of jobs."""
    lines = [re.sub(r"^.*-- python -m pipeline ", "shardferry ", line) for line in console_lines()]
    for command in _COMMANDS.commands.values():
        lines += re.findall(r"^  (.*)$", command.epilog, re.MULTILINE)
    found = [re.split(r" [>|] ", re.sub(r"^.*-- python -m pipeline ", "shardferry ", line))[0] for line in lines]
    return sorted({line for line in found if line.startswith("shardferry ")})


@pytest.mark.parametrize("line", commands_shown())
def test_commands_are_parsed(line: str) -> None:
    name, *words = shlex.split(line)[1:]
    _COMMANDS.commands[name].make_context(name, words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_commands_in_sentences_have_their_options(page: Path) -> None:
    """`shardferry run STAGE.yaml [--report F]` is no command line, but its options are there."""
    lacking = []
    for usage in _INLINE.findall(page.read_text(encoding="utf-8")):
        words = re.findall(r"[\w.*-]+", usage)
        command = _COMMANDS if words[0].startswith("-") else _COMMANDS.commands.get(words[0])
        options = {"--help"} if command is None else {o for p in command.params for o in p.opts} | {"--help"}
        lacking += (
            [usage] if command is None else [word for word in words if word.startswith("--") and word not in options]
        )
    assert not lacking


def test_calls_have_arguments_that_exist() -> None:
    wrong = []
    for page, block in blocks("python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "shardferry":
                wrong += [(page, name.name) for name in node.names if not _imports(node.module or "", name.name)]
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "shardferry":
                wrong += [] if hasattr(shardferry, node.attr) else [(page, f"shardferry.{node.attr}")]
            elif isinstance(node, ast.Call) and (called := _called(node.func)) is not None:
                names = [keyword.arg for keyword in node.keywords if keyword.arg]
                wrong += [(page, f"{ast.unparse(node.func)}({name}=)") for name in names if not _takes(called, name)]
    assert not wrong


def _imports(module: str, name: str) -> bool:
    return hasattr(__import__(module, fromlist=[name]), name)


def _called(function: ast.expr) -> Any:
    """The public function or class that is called; None: something else."""
    if isinstance(function, ast.Name):
        return next((getattr(place, function.id) for place in _PLACES if function.id in place.__all__), None)
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        owner = {"shardferry": shardferry, **_METHODS}.get(function.value.id)
        return getattr(owner, function.attr, None)
    return None


def _takes(called: Any, name: str) -> bool:
    parameters = inspect.signature(called).parameters
    more = next((p for p in parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD), None)
    known = set(parameters)
    if more is not None:  # ``**read: Unpack[ReadKeywords]``
        known |= set(shardferry.config.ReadKeywords.__annotations__)
    return name in known


def test_methods_that_blocks_call_exist() -> None:
    wrong = [
        (page, ast.unparse(node))
        for page, block in blocks("python")
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in _METHODS
        and not hasattr(_METHODS[node.value.id], node.attr)
    ]
    assert not wrong


def test_specs_are_specs() -> None:
    """Blocks of YAML whose keys are sections of a spec; the others are of programs that run a stage."""
    sections, found = set(schemas.StageConfig.model_fields), 0
    for page, block in blocks("yaml"):
        values = yaml.safe_load(block)
        if set(values) <= sections:
            schemas.StageConfig.from_values(values, source=page)
            found += 1
    assert found >= 7


def test_programs_are_there() -> None:
    lacking = []
    for line in console_lines():
        words = line.split()
        if words[0].startswith("scripts/"):
            lacking += [] if (REPOSITORY / words[0]).exists() else [words[0]]
        elif "-m" in words and words[words.index("-m") + 1] not in ("venv", "pipeline"):
            module = words[words.index("-m") + 1].replace(".", "/")
            there = (REPOSITORY / f"{module}.py").exists() or (REPOSITORY / module / "__main__.py").exists()
            lacking += [] if there else [module]
    assert not lacking
