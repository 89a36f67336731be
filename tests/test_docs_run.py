"""What the quick start, the guides and the page of errors show, runs: commands, whole programs, and calls that raise."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from examples import torchrun
from examples.task import make_optimizer, network, train_step
from shardferry.pipeline.cli import main
from tests.support.commands import REPOSITORY, without_numbers

DOCS = REPOSITORY / "docs"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_ELSEWHERE = ("pip ", "python3 -m venv", "shardferry run")  # other tests install, and start Ray


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of each block of a page."""
    return _BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))


def run_program(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a whole program in this process; what it prints is in the comment behind the last line."""
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one process saves alone
        exec(compile(code, "a block", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip() == code.strip().rpartition("  # ")[2]


def run_command(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints. Those of Shardferry run in this process, which has imported everything."""
    if command.startswith("shardferry "):
        command, _, file = command.partition(" > ")
        capsys.readouterr()
        assert main(shlex.split(command)[1:]) == 0
        printed = capsys.readouterr().out
        if file:
            Path(file).write_text(printed, encoding="utf-8")
        return printed
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    words = [sys.executable, "-m", "torch.distributed.run", *shlex.split(command.removeprefix("torchrun "))]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_quick_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Commands print the lines that the page shows, whatever the numbers in them; losses are those of a run that was not
    interrupted and wraps nothing.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "runs" / "step-9").mkdir(parents=True)  # of a save that was cut off
    losses: list[float] = []
    for language, block in blocks("quickstart.md"):
        if language == "python" and block.startswith("import "):
            run_program(block, capsys)
        elif language == "console":
            for command, shown in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE):
                if command.startswith(_ELSEWHERE):
                    continue
                printed = run_command(command, capsys)
                lines = {without_numbers(line) for line in printed.splitlines()}
                assert {without_numbers(line) for line in shown.splitlines() if line != "..."} <= lines
                losses += map(float, re.findall(r"^step \d+ loss (\S+)$", printed, re.MULTILINE))

    model = network()
    optimizer = make_optimizer(model)
    assert losses == pytest.approx([train_step(model, optimizer, step) for step in range(6)], rel=1e-5)
    assert torchrun.newest_complete(tmp_path / "runs") == tmp_path / "runs" / "step-6"


@pytest.mark.parametrize("page", sorted(page.relative_to(DOCS).as_posix() for page in DOCS.glob("guides/*.md")))
def test_programs_of_the_guides(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for language, block in blocks(page):
        if language == "python" and block.startswith("import "):
            run_program(block, capsys)


def test_errors_are_raised_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of Python that a block of output follows raises that error."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "errors_page"}
    shown = blocks("errors.md")
    for (language, code), (following, message) in zip(shown, [*shown[1:], ("", "")], strict=True):
        if language != "python":
            continue
        said = ""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                exec(compile(code, "a block of docs/errors.md", "exec"), names)
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
        wanted = message.strip() if following == "output" else ""
        if wanted.endswith("..."):
            said = said[: len(wanted) - 3] + "..."
        assert without_numbers(said) == without_numbers(wanted)
