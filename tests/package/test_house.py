"""The figures of `scripts/house`: counted on small trees by hand, and the imports of the core by another program."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import grimp
import pytest

from scripts import house
from tests.support.commands import REPOSITORY


@pytest.fixture
def core(tmp_path: Path) -> Path:
    """A repository's root with a core of three levels that breaks no limit."""
    write(
        tmp_path,
        {
            "shardferry/__init__.py": """
                from typing import TYPE_CHECKING
                if TYPE_CHECKING:
                    from shardferry.load import load
            """,
            "shardferry/errors.py": "import math",
            "shardferry/load.py": """
                from shardferry import errors
                from shardferry.storage import LocalReader
                def load(a, b):
                    import fsspec
                    return errors.f(1, 2, 3, 4, 5, key=6, other=7)
            """,
            "shardferry/storage/__init__.py": "from shardferry.storage.local import LocalReader",
            "shardferry/storage/local.py": """
                import shardferry.errors
                LocalReader = 1
            """,
        },
    )
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "cli.py").write_text("f(1, 2, 3, 4, 5, 6)\n")
    (tmp_path / "shardferry" / "pipeline").symlink_to("../pipeline")
    return tmp_path


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(dedent(text).strip() + "\n")


def figures(root: Path) -> dict[str, house.Figure]:
    """By the first word of their names."""
    return {figure.name.split()[0]: figure for figure in house.figures(root)}


def test_figures_of_a_small_core(core: Path) -> None:
    """load -> storage/local (through the room's __init__) -> errors."""
    found = figures(core)
    assert {name: figure.value for name, figure in found.items()} == {
        "files": 3,
        "levels": 3,
        "circles": 0,
        "lines": 3 + 1 + 5 + 1 + 2,
        "calls": 0,
        "imports": 0,
        "longest": 3,
        "lazy": 0,
    }
    assert house.main(core) == 0


def test_a_module_that_a_room_exports_is_imported_from_where_it_is(core: Path) -> None:
    graph = house.import_graph(house.read_core(core))
    assert graph == {
        "shardferry": set(),
        "shardferry.errors": set(),
        "shardferry.load": {"shardferry.errors", "shardferry.storage.local"},
        "shardferry.storage": set(),
        "shardferry.storage.local": {"shardferry.errors"},
    }


@pytest.mark.parametrize(
    ("figure", "files", "value", "offender"),
    [
        (
            "circles",
            {"shardferry/errors.py": "def f():\n    from shardferry import load"},
            2,
            "shardferry.errors -> shardferry.load -> shardferry.errors",
        ),
        (
            "levels",
            {f"shardferry/m{n}.py": f"from shardferry import m{n + 1}" for n in range(9)} | {"shardferry/m9.py": ""},
            10,
            "shardferry.m0 -> shardferry.m1 -> ",
        ),
        ("files", {f"shardferry/storage/m{n}.py": "" for n in range(15)}, 17, "shardferry/storage: 17 files"),
        ("files", {f"pipeline/m{n}.py": "" for n in range(16)}, 17, "pipeline: 17 files"),
        ("calls", {"shardferry/a.py": "f(1, 2, 3, 4, 5, *more)"}, 1, "shardferry/a.py:1: 6 positional arguments"),
        (
            "imports",
            {"shardferry/a.py": "import typing\nif typing.TYPE_CHECKING:\n    import shardferry.load, obstore"},
            1,
            "shardferry/a.py:3: shardferry.load",
        ),
        ("lazy", {"shardferry/a.py": "def f():\n    import obstore\n    import json"}, 1, "shardferry/a.py:3: json"),
        ("lazy", {"shardferry/storage/a.py": "def f():\n    from . import local"}, 1, "a.py:2: shardferry.storage"),
    ],
)
def test_what_breaks_a_limit_is_named(
    core: Path,
    capsys: pytest.CaptureFixture[str],
    figure: str,
    files: dict[str, str],
    value: int,
    offender: str,
) -> None:
    write(core, files)
    found = figures(core)[figure]
    assert (found.value, found.is_broken) == (value, True)
    assert any(offender in line for line in found.offenders)
    assert house.main(core) == 1
    assert offender in capsys.readouterr().out


def test_too_many_lines(core: Path) -> None:
    write(core, {"shardferry/long.py": "# a line\n" * (house.MAX_LINES - 12)})
    assert house.main(core) == 0
    write(core, {"shardferry/one.py": "# a line more"})
    assert figures(core)["lines"].is_broken


def test_imports_of_the_core_are_those_that_another_program_finds() -> None:
    """import-linter's graph has them too; where it has a room, we have the module that the room exports."""
    modules = house.read_core(REPOSITORY)
    rooms = {name for name, module in modules.items() if module.is_package}
    other = grimp.build_graph("shardferry", cache_dir=None)
    for name, imported in house.import_graph(modules).items():
        if name not in rooms:
            theirs = other.find_modules_directly_imported_by(name) & set(modules)
            assert theirs - rooms <= imported, name
            assert imported <= theirs or theirs & rooms, name


def test_it_runs_by_itself() -> None:
    """It needs nothing that is installed."""
    command = [sys.executable, "-I", "-S", str(REPOSITORY / "scripts" / "house.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode in (0, 1), done.stderr
    assert done.stdout.startswith("files in a folder")
    assert ("BROKEN" in done.stdout) == (done.returncode == 1)
