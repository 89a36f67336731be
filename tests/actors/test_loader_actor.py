"""The face that a loader has for Ray."""

from __future__ import annotations

import subprocess
import sys

from shardferry.actors.loader import Loader
from shardferry.actors.loader_actor import METHODS, LoaderActor


def test_it_has_the_methods_of_a_loader() -> None:
    public = {name for name, value in vars(Loader).items() if callable(value) and not name.startswith("_")}
    assert set(METHODS) == public
    assert all(callable(getattr(LoaderActor, name)) for name in METHODS)


def test_a_process_that_holds_handles_imports_no_torch() -> None:
    """Ray imports the class with a handle, and the guard gets each loader's."""
    program = (
        "import sys, shardferry.actors.guard, shardferry.actors.loader_actor; sys.exit(int('torch' in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
