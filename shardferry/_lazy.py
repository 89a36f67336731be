"""Give a package its public names without importing the modules that define them (PEP 562)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The ``__getattr__`` and ``__dir__`` of a package whose public names are imported when they are first used.

    Args:
        package: the package's own ``__name__``.
        homes: for each module, the public names that it defines.

    Returns:
        ``__getattr__``, which raises AttributeError for any other name, and ``__dir__``.
    """
    home_of = {name: module for module, names in homes.items() for name in names}

    def getattr_of_package(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(home_of[name]), name)
        setattr(sys.modules[package], name, value)  # the next access doesn't come here
        return value

    def dir_of_package() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home_of})

    return getattr_of_package, dir_of_package
