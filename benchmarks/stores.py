"""Where a checkpoint is loaded from: files that the page cache has, files that it has not, or a slow object store."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np

_REPOSITORY = Path(__file__).resolve().parents[1]
_READ_BYTES = 8 * 1024 * 1024
LINE_BYTES_PER_S = 400e6  # of the throttled store, to all ranks together
LATENCY_S = 0.020  # of each of its requests


class StoreKind(Enum):
    """The storage that is measured."""

    WARM = "warm"
    COLD = "cold"
    THROTTLED = "throttled"

    @property
    def title(self) -> str:
        return {
            StoreKind.WARM: "page cache warm",
            StoreKind.COLD: "page cache cold",
            StoreKind.THROTTLED: f"object store of {LINE_BYTES_PER_S / 1e6:g} MB/s in all and {1000 * LATENCY_S:g} ms a request",
        }[self]


@dataclass(frozen=True, slots=True)
class Store:
    """One checkpoint in one kind of storage."""

    kind: StoreKind
    directory: str  # its files, on a disk of this machine
    location: str  # what is opened: the directory, or a URL

    @property
    def is_remote(self) -> bool:
        return self.location != self.directory

    def sibling(self, name: str) -> Store:
        """The same state in another format, which lies beside it."""
        return Store(self.kind, f"{self.directory}-{name}", f"{self.location}-{name}")

    def make_ready(self) -> float:
        """Before each load, by one rank: nothing is in the page cache of a cold store.

        Returns:
            The share of the files that still is, of a cold store; else 0.
        """
        if self.kind is not StoreKind.COLD:
            return 0.0
        drop_page_cache(self.directory)
        return resident_share(self.directory)

    def asked(self) -> tuple[int, int] | None:
        """Bytes and requests that a remote store has served so far; None where the files are read without a server."""
        if not self.is_remote:
            return None
        with urllib.request.urlopen(f"{self.location.rpartition('/')[0]}/.asked", timeout=60) as answer:
            told = json.load(answer)
        return told["bytes"], told["requests"]


def files_of(directory: str) -> list[Path]:
    """All files of a checkpoint, at any depth, sorted."""
    return sorted(path for path in Path(directory).rglob("*") if path.is_file())


def warm_page_cache(directory: str) -> None:
    """Read every file once, so that the kernel holds all of them."""
    buffer = bytearray(_READ_BYTES)
    for file in files_of(directory):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def drop_page_cache(directory: str) -> None:
    """Write every file to its disk, and let the kernel forget it."""
    for file in files_of(directory):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def resident_share(directory: str) -> float:
    """How much of the files the page cache has: 0 to 1."""
    pages = [_resident_pages(file) for file in files_of(directory) if file.stat().st_size]
    return sum(here for here, _ in pages) / max(sum(of for _, of in pages), 1)


def _resident_pages(file: Path) -> tuple[int, int]:
    """Pages in the page cache, and all of them. Mapping a file reads nothing of it."""
    import ctypes

    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        states = np.zeros(-(-len(mapped) // mmap.PAGESIZE), np.uint8)
        address, length = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(len(mapped))
        failed = ctypes.CDLL(None, use_errno=True).mincore(address, length, ctypes.c_void_p(states.ctypes.data))
        del view  # else the mapping can't be closed
        if failed:
            raise OSError(ctypes.get_errno(), f"{file}: the kernel doesn't say what of it is in memory")
        return int((states & 1).sum()), len(states)


@contextmanager
def object_store(directory: str) -> Iterator[str]:
    """The URL of a slow web server of a directory, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.throttled_server", directory]
    limits = ["--bandwidth", str(LINE_BYTES_PER_S), "--latency", str(LATENCY_S)]
    server = subprocess.Popen(
        [*command, *limits], cwd=_REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin
    assert server.stdout
    try:
        url = server.stdout.readline().strip()
        if not url:
            raise RuntimeError(f"the server of {directory} did not start")
        yield url
    finally:
        server.stdin.close()
        server.wait(timeout=60)
        server.stdout.close()
