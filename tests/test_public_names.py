"""The names that others import: there, documented, and nothing more."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

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


# Their names are imported when they are first used.
LAZY = ["shardferry", "shardferry.pipeline", "shardferry.actors", "shardferry.schemas"]


@pytest.mark.parametrize("package", [*LAZY, "shardferry.dcp"])
def test_every_public_name_is_there_and_documented(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__doc__
    names = set(module.__all__)
    assert PROMISED.get(package, names) <= names
    for name in names:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{package}.{name}"


def imports_for_type_checkers(source: str) -> dict[str, str]:
    """The names that a module imports from others outside of functions, and from which; without helpers of the run time."""
    tree = ast.parse(source)
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    statements = [node for node in (*tree.body, *block.body) if isinstance(node, ast.ImportFrom)]
    return {alias.name: node.module or "" for node in statements for alias in node.names}


@pytest.mark.parametrize("package", LAZY)
def test_type_checkers_see_what_is_there(package: str) -> None:
    """A lazy package lists its names three times; each list has the same names, and they are the same objects."""
    module = importlib.import_module(package)
    assert module.__file__ is not None
    seen = imports_for_type_checkers(Path(module.__file__).read_text(encoding="utf-8"))
    del seen["TYPE_CHECKING"]
    assert set(seen) == set(module.__all__)
    for name, home in seen.items():
        assert getattr(module, name) is getattr(importlib.import_module(home), name)
    assert set(module.__all__) <= set(dir(module))


@pytest.mark.parametrize("package", LAZY)
def test_no_other_name_is_there(package: str) -> None:
    module = importlib.import_module(package)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nonsense'"):
        module.nonsense  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'nonsense'"):
        exec(f"from {package} import nonsense")


@pytest.mark.parametrize("package", LAZY)
def test_each_name_can_be_imported(package: str) -> None:
    names: dict[str, object] = {}
    exec(f"from {package} import *", names)
    assert set(importlib.import_module(package).__all__) <= set(names)
