"""Checkpoints that training programs saved, each written once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest

from tests.programs.launch import Launcher, Saved

SaveWith = Callable[..., Saved]


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    """Runs the programs."""
    launcher = Launcher()
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def saved_with(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> SaveWith:
    """What ``saved_with(program, *options)`` saved on 2 ranks."""
    return cache(
        lambda program, *options: launcher.save_with(program, *options, directory=tmp_path_factory.mktemp(program))
    )
