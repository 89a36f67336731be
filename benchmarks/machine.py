"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def describe(file_system: str) -> dict[str, str]:
    """Machine and versions, in words.

    Args:
        file_system: the kind that holds the checkpoints.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": f"{_cpu_model()}, {os.cpu_count()} cores",
        "memory": f"{memory / 2**30:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "file system": file_system,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "shardferry": _own_version(),
    }


def _own_version() -> str:
    try:
        return version("shardferry")
    except PackageNotFoundError:
        return "not installed (working tree)"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
