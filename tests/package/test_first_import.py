"""Any module directly below `shardferry` can be the first that a program imports."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.support.commands import REPOSITORY

# One process for all: what torch and others take to import is taken once.
PROGRAM = """
import json, pkgutil, sys, traceback
from importlib import import_module

names = [found.name for found in pkgutil.iter_modules([sys.argv[1]], "shardferry.")]
failed = {}
for name in names:
    for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] == "shardferry"]:
        del sys.modules[loaded]
    try:
        if name != "shardferry.__main__":
            module = import_module(name)
            for public in getattr(module, "__all__", ()):
                getattr(module, public)
    except Exception:
        failed[name] = traceback.format_exc()
print(json.dumps([names, failed]))
"""


def test_each_can_be_imported_first() -> None:
    """No module relies on another having been imported before it, and each public name of a room is there."""
    command = [sys.executable, "-c", PROGRAM, str(REPOSITORY / "shardferry")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    names, failed = json.loads(done.stdout)
    assert {"shardferry.load", "shardferry.storage", "shardferry.dcp", "shardferry.pipeline"} <= set(names)
    assert not failed, "\n".join(failed.values())
