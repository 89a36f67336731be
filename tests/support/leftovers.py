"""What a failed or finished run must not leave behind: processes, and files in shared memory.

Other tests run on the same machine meanwhile. A process is ours if it is a descendant of this one, or has inherited
`MARK` from it; a file in shared memory is somebody else's while a process that is not ours has it open or mapped.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import ray

MARK = "SHARDFERRY_TESTS"  # environment variable that tests/conftest.py sets: the process id of this pytest
_PATIENCE_S = 15.0


@contextmanager
def nothing_left() -> Iterator[None]:
    """Fails where processes of ours, or files in /dev/shm, are there afterwards that were not there before."""
    processes = _running()
    with no_shared_files_left():
        yield
        wait_while(lambda: _running() - processes)
        left = [_describe(pid) for pid in _running() - processes]
        assert not left, f"processes left running: {left}"


@contextmanager
def nothing_held() -> Iterator[None]:
    """Fails where a run on this process's cluster keeps an arena, files in /dev/shm, or resources that were free before."""
    holders, free = arena_holders(), ray.available_resources()
    with no_shared_files_left():
        yield
        wait_while(lambda: _taken(free) or arena_holders() - holders)
        assert not _taken(free), f"still taken of the cluster: {_taken(free)}"
        left = [_describe(pid) for pid in arena_holders() - holders]
        assert not left, f"these processes have arenas: {left}"


@contextmanager
def no_shared_files_left() -> Iterator[None]:
    """Fails where files in /dev/shm are there afterwards that were not there before."""
    before = _names_in_shared_memory()
    yield
    wait_while(lambda: _new_shared_files(before))
    left = _new_shared_files(before)
    assert not left, f"left in shared memory: {sorted(left)}"


def wait_while(is_left: Callable[[], object]) -> None:
    """Return once nothing is left, or patience has ended."""
    deadline = time.monotonic() + _PATIENCE_S
    while is_left() and time.monotonic() < deadline:
        time.sleep(0.1)


def _taken(free: dict[str, float]) -> dict[str, float]:
    """CPUs and GPUs that were free, and are not any more."""
    now = ray.available_resources()
    taken = {name: free.get(name, 0.0) - now.get(name, 0.0) for name in ("CPU", "GPU")}
    return {name: amount for name, amount in taken.items() if amount > 1e-6}


def arena_holders() -> set[int]:
    """Processes of ours that have a loader's arena open or mapped."""
    return {pid for pid in _running() if any("memfd:shardferry-arena" in place for place in _files_of(pid))}


def _running() -> set[int]:
    """Processes of ours, zombies excepted."""
    descendants = {child.pid for child in psutil.Process().children(recursive=True)}
    return {
        process.pid
        for process in psutil.process_iter(["status"])
        if (process.pid in descendants or _is_marked(process.pid)) and process.info["status"] != psutil.STATUS_ZOMBIE
    } | {os.getpid()}


def _is_marked(pid: int) -> bool:
    try:
        return f"{MARK}={os.getpid()}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def _files_of(pid: int) -> set[str]:
    """Where the files are that a process has open or mapped."""
    try:
        opened = {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()}
        return opened | {line.partition("/")[2] for line in Path(f"/proc/{pid}/maps").read_text().splitlines()}
    except OSError:
        return set()


def _names_in_shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def _new_shared_files(before: set[str]) -> set[str]:
    """Names of files in /dev/shm that are not among those before, and that only processes of ours have, or none."""
    new = _names_in_shared_memory() - before
    if new:
        others = set().union(*(_files_of(pid) for pid in set(psutil.pids()) - _running()))
        new = {name for name in new if not any(place.endswith(f"dev/shm/{name}") for place in others)}
    return new


def _describe(pid: int) -> str:
    try:
        return f"{pid}: {' '.join(psutil.Process(pid).cmdline())[:120]}"
    except psutil.NoSuchProcess:
        return f"{pid}: gone"


def _shared_files() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}
