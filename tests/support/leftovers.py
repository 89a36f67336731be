"""What a failed or finished run must not leave behind: processes, and files in shared memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import ray

_PATIENCE_S = 15.0


@contextmanager
def nothing_left() -> Iterator[None]:
    """Fails where processes of ours, or files in /dev/shm, are there afterwards that were not there before."""
    processes, files = _processes(), _shared_files()
    yield
    deadline = time.monotonic() + _PATIENCE_S
    while (_processes() - processes or _shared_files() - files) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [_describe(pid) for pid in _processes() - processes]
    assert not left, f"processes left running: {left}"
    assert not _shared_files() - files, f"left in shared memory: {sorted(_shared_files() - files)}"


@contextmanager
def nothing_held() -> Iterator[None]:
    """Fails where a run on this process's cluster keeps an arena, files in /dev/shm, or resources of the cluster."""
    files, holders, resources = _shared_files(), arena_holders(), ray.cluster_resources()
    yield
    deadline = time.monotonic() + _PATIENCE_S
    while (_held(resources) or arena_holders() - holders or _shared_files() - files) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _held(resources), f"still taken of the cluster: {_held(resources)}"
    left = [_describe(pid) for pid in arena_holders() - holders]
    assert not left, f"these processes have arenas: {left}"
    assert not _shared_files() - files, f"left in shared memory: {sorted(_shared_files() - files)}"


def _held(resources: dict[str, float]) -> dict[str, float]:
    """CPUs and GPUs that are not available."""
    there = ray.available_resources()
    return {
        name: resources[name] - there.get(name, 0) for name in ("CPU", "GPU") if there.get(name, 0) < resources[name]
    }


def arena_holders() -> set[int]:
    """Processes that have a loader's arena open or mapped."""
    return {process.pid for process in psutil.process_iter() if _holds_arena(process.pid)}


def _holds_arena(pid: int) -> bool:
    name = "memfd:shardferry-arena"
    try:
        opened = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
        return name in Path(f"/proc/{pid}/maps").read_text() or any(name in target for target in opened)
    except OSError:
        return False


def _processes() -> set[int]:
    """Running descendants of this process, and orphans that say they are of Ray or of ours."""
    mine = {child.pid for child in psutil.Process().children(recursive=True)}
    return {pid for pid in mine if psutil.pid_exists(pid) and _running(pid)} | _orphans()


def _orphans() -> set[int]:
    found = set()
    for process in psutil.process_iter(["ppid", "cmdline"]):
        words = " ".join(process.info["cmdline"] or ())
        if process.info["ppid"] == 1 and any(
            word in words for word in ("raylet", "gcs_server", "ray::", "-m pipeline")
        ):
            found.add(process.pid)
    return found


def _running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _describe(pid: int) -> str:
    try:
        return f"{pid}: {' '.join(psutil.Process(pid).cmdline())[:120]}"
    except psutil.NoSuchProcess:
        return f"{pid}: gone"


def _shared_files() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}
