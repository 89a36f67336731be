"""What the wheel has in it."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import shardferry
from tests.support.commands import REPOSITORY


def in_the_tree() -> set[str]:
    """The files of the package in this working tree, through the symbolic links; without what Python left behind."""
    root = REPOSITORY / "shardferry"
    found = {
        (Path(folder) / name).relative_to(REPOSITORY).as_posix()
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
    }
    return {name for name in found if "__pycache__" not in name}


def test_one_top_level_name(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "shardferry",
        f"shardferry-{shardferry.__version__}.dist-info",
    }


def test_all_of_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    assert {name for name in names if name.startswith("shardferry/")} == in_the_tree()


def test_code_and_data_of_each_folder(wheel: Path) -> None:
    """By name, in case the working tree lacks them too."""
    names = set(zipfile.ZipFile(wheel).namelist())
    code = {
        "__init__.py",
        "__main__.py",
        "load.py",
        "dcp/__init__.py",
        "pipeline/stage.py",
        "pipeline/demo/story.py",
        "actors/loader.py",
        "schemas/stage_config.py",
    }
    data = {"py.typed", "pipeline/demo/corpus.txt"}
    assert {f"shardferry/{name}" for name in code | data} <= names


def test_the_command_that_it_installs(wheel: Path) -> None:
    dist_info = f"shardferry-{shardferry.__version__}.dist-info"
    text = zipfile.ZipFile(wheel).read(f"{dist_info}/entry_points.txt").decode()
    assert text.split() == ["[console_scripts]", "shardferry", "=", "shardferry.pipeline.cli:main"]


def test_the_same_from_a_source_distribution(wheel: Path, tmp_path: Path) -> None:
    """It has no symbolic links, but each of the three folders twice: at the top, and in the package."""
    root = f"shardferry-{shardferry.__version__}"
    build(REPOSITORY, "sdist", tmp_path)
    with tarfile.open(tmp_path / f"{root}.tar.gz") as archive:
        names = archive.getnames()
        assert len(names) == len(set(names))
        assert not any(member.issym() for member in archive)
        archive.extractall(tmp_path, filter="data")
    assert {f"{root}/{name}" for name in ("pipeline/cli.py", "actors/loader.py", "schemas/plan_report.py")} <= {*names}

    build(tmp_path / root, "wheel", tmp_path)
    (from_source,) = tmp_path.glob("*.whl")
    assert sorted(zipfile.ZipFile(from_source).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


def build(root: Path, target: str, directory: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(directory)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
