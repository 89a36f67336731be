"""A ``python`` that has everything that we need, but not us."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path


def bare_environment(directory: Path, *path: Path) -> dict[str, str]:
    """The environment variables of such a ``python``: an editable install works by a .pth file, which is not read here.

    Args:
        directory: gets a folder ``bin`` with the ``python``.
        path: folders that it also finds modules in, before all others.
    """
    (directory / "bin").mkdir()
    (directory / "bin" / "python").symlink_to(sys._base_executable)  # type: ignore[attr-defined]
    return {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",
        "PATH": f"{directory / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([*map(str, path), sysconfig.get_path("purelib")]),
    }
