"""Fixtures of the tests of stages: the command line in this process, and trainers that many tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray

from shardferry.pipeline.cli import main
from tests.support.commands import Command, Finished
from tests.support.trainers import Target, start_trainers


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


@pytest.fixture(scope="module")
def two_trainers(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Any]]:
    trainers = start_trainers(2, str(tmp_path_factory.mktemp("trainers") / "store"))
    yield trainers
    for trainer in trainers:
        ray.kill(trainer)


@pytest.fixture
def trainers_with(two_trainers: list[Any]) -> Callable[[Callable[[], Target]], list[Any]]:
    """Two trainers that have what ``build`` returns; they are the same processes in all tests."""

    def trainers(build: Callable[[], Target]) -> list[Any]:
        ray.get([trainer.begin.remote(build) for trainer in two_trainers])
        return two_trainers

    return trainers
