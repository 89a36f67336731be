"""What one rank spends on one load: seconds, CPU, bytes and calls of reading, peak memory."""

from __future__ import annotations

import ctypes
import gc
import mmap
import resource
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist

_RESET_PEAK = "5"  # see clear_refs in the kernel's Documentation/filesystems/proc.rst
_SAMPLE_S = 0.002


@dataclass(frozen=True, slots=True)
class Spent:
    """One load on one rank."""

    start_s: float  # of the machine's monotonic clock, which all its processes share
    stop_s: float
    cpu_s: float  # user and system, all threads
    bytes_read: int  # through read calls, of files; not what is looked at through a mapping
    read_calls: int
    peak_bytes: int  # resident memory at its highest, over what was resident before


def spend(work: Callable[[], None]) -> Spent:
    """Do this rank's part of a load between two barriers, and measure it."""
    gc.collect()
    _return_free_memory()
    peak = _PeakMemory()
    read_before = _process_io()
    dist.barrier()
    cpu_before = _cpu_s()
    start = time.perf_counter()
    work()
    stop = time.perf_counter()
    cpu = _cpu_s() - cpu_before
    read_after = _process_io()
    peak_bytes = peak.stop()
    dist.barrier()
    return Spent(
        start,
        stop,
        cpu,
        read_after["rchar"] - read_before["rchar"],
        read_after["syscr"] - read_before["syscr"],
        peak_bytes,
    )


def make_pages_ready(nbytes: int) -> None:
    """Let the kernel have as many pages that were touched lately, before a load that takes fresh ones: all ranks at once.

    Below a virtual machine its host gives a page at its first touch, and may take one back that is not used: whoever loads
    after another one has freed its memory would have pages for half the price.
    """
    pages = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without transparent huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    np.frombuffer(pages, np.uint8)[:: mmap.PAGESIZE] = 1
    dist.barrier()
    pages.close()
    dist.barrier()


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _process_io() -> dict[str, int]:
    """Counters of this process. Sockets don't count, files and pipes do."""
    pairs = (line.split(":") for line in Path("/proc/self/io").read_text().splitlines())
    return {name: int(value) for name, value in pairs}


def _return_free_memory() -> None:
    """What was freed but is still held by the allocator would hide the next load's peak."""
    with suppress(AttributeError, OSError):  # another libc than GNU's
        ctypes.CDLL(None).malloc_trim(0)


class _PeakMemory:
    """The highest resident memory since it was made, less that at its making.

    The kernel keeps the peak; where it lets nobody reset it, a thread looks again and again.
    """

    def __init__(self) -> None:
        self._before = _status_bytes("VmRSS")
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._seen = self._before
        try:
            Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
        except OSError:
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()

    def stop(self) -> int:
        if self._thread is None:
            return _status_bytes("VmHWM") - self._before
        self._stop.set()
        self._thread.join()
        return self._seen - self._before

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_S):
            self._seen = max(self._seen, _status_bytes("VmRSS"))


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
