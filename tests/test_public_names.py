"""The names that others import: there, documented, and nothing more."""

from __future__ import annotations

import importlib
import inspect

import pytest

PROMISED = {
    "shardferry": {
        "Catalog",
        "OptimizerReceiver",
        "Region",
        "Shard",
        "ShardHandle",
        "ShardferryError",
        "load_optimizer_state",
        "open_checkpoint",
    },
}


@pytest.mark.parametrize("package", ["shardferry", "shardferry.pipeline", "shardferry.schemas", "shardferry.dcp"])
def test_every_public_name_is_there_and_documented(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__doc__
    names = set(module.__all__)
    assert PROMISED.get(package, names) <= names
    for name in names:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{package}.{name}"
