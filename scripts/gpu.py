"""Run tests/gpu with nothing but torch, NumPy and pytest, and print the GPU and the versions. See scripts/gpu."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

NOTHING_TESTED = 2
_DEVICES = ("nvidia[0-9]*", "kfd", "dxg")  # of NVIDIA, AMD, and either in Windows' Linux


def main(arguments: list[str]) -> int:
    """The exit status."""
    if not any(any(Path("/dev").glob(name)) for name in _DEVICES):
        return _nothing_tested("there is no GPU on this machine (no /dev/nvidia0, /dev/kfd or /dev/dxg)")
    if sys.version_info < (3, 11):  # noqa: UP036 (a bare machine has its own python3)
        return _nothing_tested(f"{sys.executable} is Python {platform.python_version()}; the least is 3.11")
    try:
        import numpy
        import pytest
        import torch
    except ImportError as error:
        return _nothing_tested(f"{sys.executable} has no {error.name}; PYTHON=... takes another one")
    if not torch.cuda.is_available():
        return _nothing_tested(f"torch {torch.__version__} of {sys.executable} sees no GPU on this machine")
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        print(f"GPU {index}: {found.name}, {found.total_memory / 2**30:.0f} GiB, UUID {found.uuid}")
    print(f"Linux {platform.release()}, Python {platform.python_version()}, torch {torch.__version__} ", end="")
    print(
        f"(CUDA {torch.version.cuda}, HIP {torch.version.hip}), numpy {numpy.__version__}, pytest {pytest.__version__}"
    )
    sys.stdout.flush()
    # The project's own settings and tests/conftest.py ask for plugins and packages that a bare machine hasn't.
    settings = ["-c", os.devnull, "--rootdir", ".", "--noconftest", "-p", "no:cacheprovider"]
    settings += ["-o", "markers=gpu: needs a CUDA device", "-o", "faulthandler_timeout=300"]
    status = int(pytest.main([*settings, "-ra", *(arguments or ["tests/gpu"])]))
    if not arguments and not status:
        sys.path.insert(0, os.curdir)
        from tests.gpu import speed

        speed.main()
    return status


def _nothing_tested(reason: str) -> int:
    print(f"scripts/gpu: {reason}; nothing was tested", file=sys.stderr)
    return NOTHING_TESTED


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
