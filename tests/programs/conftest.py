"""Checkpoints that training programs saved, each written once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from tests.programs.launch import Saved, save_with

SaveWith = Callable[..., Saved]


@pytest.fixture(scope="session")
def saved_with(tmp_path_factory: pytest.TempPathFactory) -> SaveWith:
    """What ``saved_with(program, *options)`` saved on 2 ranks."""
    return cache(lambda program, *options: save_with(program, *options, directory=tmp_path_factory.mktemp(program)))
