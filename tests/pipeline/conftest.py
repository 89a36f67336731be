"""The command line in this process: importing torch and Ray anew takes longer than most commands."""

from __future__ import annotations

import pytest

from shardferry.pipeline.cli import main
from tests.support.commands import Command, Finished


@pytest.fixture
def shardferry(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """``shardferry(*arguments)`` runs a command on the Ray that this process has, else on one of its own."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def run(*arguments: object) -> Finished:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return Finished(status, *capsys.readouterr())

    return run
