"""One allocation a rank, into which everything is read and from which every tensor is a view.

On the host it is an anonymous memory file: other processes of the node can map it through ``/proc/<pid>/fd``, and it is
gone when the last of them is. On a GPU it is one tensor of bytes, filled through pinned host memory.
"""

from __future__ import annotations

import errno
import fcntl
import math
import mmap
import os
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shardferry.errors import ArenaError
from shardferry.stats import BusyTimes

_NOWHERE: np.ndarray = np.empty(0, dtype=np.int64)
_NO_BYTES = torch.empty(0, dtype=torch.uint8)
SEAL_FUTURE_WRITE = 0x0010  # F_SEAL_FUTURE_WRITE of linux/fcntl.h, which the fcntl module lacks
NAME = "shardferry-arena"  # as /proc shows it: memfd:shardferry-arena
_PINNED_BYTES = 8 * 1024 * 1024  # of a staging buffer for GPU arenas: one request
_NUM_BUFFERS = 2  # of each reading thread: one is filled while the other is copied


def host_identity() -> str:
    """Names this machine and process namespace: where it is equal, ``/proc/<pid>`` means the same process."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{Path('/proc/self/ns/pid').stat().st_ino}"


def gpu_identity(device: torch.device) -> str | None:
    """Names a device's GPU, equally in all processes: its UUID. None for host memory."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def available_host_bytes() -> int:
    """Memory that this process can still take: of the machine, and of its control group where that has a limit."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = [int(meminfo["MemAvailable"].split()[0]) * 1024]
    for limit_file, used_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # no such control group, or "max"
            free.append(int(Path(limit_file).read_text()) - int(Path(used_file).read_text()))
    return max(0, min(free))


def check_host_room(arenas_bytes: Sequence[int], *, available_bytes: int, host: str, fraction: float = 1.0) -> None:
    """Raise ArenaError, before any arena takes memory, if the host has less than all of them need.

    Args:
        fraction: of what is available that they may take: ``handoff.keep.memory_fraction`` for arenas that stay.
    """
    needed, allowed = sum(arenas_bytes), int(fraction * available_bytes)
    if needed > allowed:
        limit, way_out = "", ""
        if fraction < 1:
            limit = f", of which handoff.keep.memory_fraction = {fraction:g} allows {allowed}"
            way_out = ", or drop what is kept there, or set handoff.keep.memory_fraction higher"
        raise ArenaError(
            f"host {host}: {len(arenas_bytes)} arena(s) need {needed} bytes, {available_bytes} are available{limit}: "
            f"{needed - allowed} bytes are missing. Spread the ranks over more hosts or use more ranks{way_out}."
        )


class _Bytes:
    """What both kinds of arena are: one tensor of bytes."""

    nbytes: int
    device: torch.device
    _bytes: torch.Tensor

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A view: ``shape`` elements from byte ``offset`` on, row-major."""
        return view_bytes(self._bytes, offset, shape, dtype)

    def as_bytes(self) -> torch.Tensor:
        """A view of the whole arena: one dimension of ``nbytes`` uint8."""
        return self.tensor(0, (self.nbytes,), torch.uint8)


class HostArena(_Bytes):
    """Bytes of an anonymous memory file, mapped into this process. It takes memory page by page, as it is written to.

    Args:
        nbytes: of data.
        num_places: numbers behind the data, which tell other processes of the node where the tensors are.
        is_shareable: whether other processes can open it. The kernel gives private memory in huge pages where it gives memory
            files none (its usual settings): first touches take a quarter of the time.

    Raises:
        ArenaError: there is no room.
    """

    def __init__(self, nbytes: int, *, num_places: int = 0, is_shareable: bool = True) -> None:
        self.nbytes = max(nbytes, 1)
        self.device = torch.device("cpu")
        self.directory_offset = -(-self.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        file_bytes = self.directory_offset + 8 * num_places if num_places else self.nbytes
        self.descriptor = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING) if is_shareable else -1
        try:
            if is_shareable:
                os.ftruncate(self.descriptor, file_bytes)
            kind = mmap.MAP_SHARED if is_shareable else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            pages = mmap.mmap(self.descriptor, file_bytes, kind, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            self.close()
            raise ArenaError(f"an arena of {self.nbytes} bytes can't be mapped: {error}") from error
        with suppress(OSError):  # a kernel without transparent huge pages of this kind
            pages.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = torch.frombuffer(pages, dtype=torch.uint8)
        self.memory = memoryview(pages)
        self.directory = np.frombuffer(pages, np.int64, num_places, self.directory_offset) if num_places else _NOWHERE

    @property
    def is_shareable(self) -> bool:
        """Whether other processes can open it."""
        return self.descriptor >= 0

    def as_bytes(self) -> torch.Tensor:
        """The whole arena; where this object has dropped its own mapping, a private one."""
        if self.descriptor < 0 or len(self.memory):
            return super().as_bytes()
        pages = mmap.mmap(self.descriptor, self.nbytes, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        return torch.frombuffer(pages, dtype=torch.uint8)

    def freeze(self) -> None:
        """Make the bytes immutable for everybody: the kernel refuses later writes and writable mappings, and this one goes."""
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, SEAL_FUTURE_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self.detach()

    def detach(self) -> None:
        """Drop this object's own mapping; tensors made before keep theirs, and so does the memory file.

        Another thread unmaps it, so that nobody waits: the kernel takes some 60 ms a GiB.
        """
        mapping = [self._bytes, self.memory, self.directory]
        self._drop_mapping()
        threading.Thread(target=mapping.clear, name="shardferry-unmap").start()

    def _drop_mapping(self) -> None:
        self._bytes = _NO_BYTES
        self.memory = memoryview(b"")
        self.directory = _NOWHERE

    def close(self) -> None:
        """Give the memory back, unless a tensor or another process still uses it."""
        self._drop_mapping()
        if getattr(self, "descriptor", -1) >= 0:  # -1: `__init__` has failed early
            os.close(self.descriptor)
            self.descriptor = -1

    __del__ = close


class DeviceArena(_Bytes):
    """Bytes on a GPU.

    Attributes:
        ticket: a memory file by which a process that maps the GPU's memory sees that this process lives, and that no other
            has taken the arena.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.nbytes = max(nbytes, 1)
        self.device = device
        try:
            self._bytes = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            free, total = torch.cuda.mem_get_info(device)
            raise ArenaError(
                f"{device}: the arena needs {nbytes} bytes, {free} of {total} are free: "
                f"{max(0, nbytes - free)} bytes are missing. Use more ranks, or device: cpu."
            ) from error
        self.ticket = HostArena(1)

    def close(self) -> None:
        """Give the memory back to the GPU, once no tensor uses it, here or in a process that has mapped it."""
        self._bytes = _NO_BYTES
        self.ticket.close()
        if self.device.type == "cuda":
            torch.cuda.ipc_collect()
            torch.cuda.empty_cache()


Arena = HostArena | DeviceArena


def allocate_arena(nbytes: int, device: torch.device) -> Arena:
    """One arena on the host or on a GPU. Raises ArenaError where there is no room."""
    return HostArena(nbytes) if device.type == "cpu" else DeviceArena(nbytes, device)


class Destination(ABC):
    """Memory that read bytes are put into: an arena, or a buffer. Safe to use from several threads."""

    @abstractmethod
    def writable(self, byte_offset: int, nbytes: int) -> AbstractContextManager[memoryview]:
        """Contiguous host memory to fill inside the ``with``; on leaving, the bytes are at ``byte_offset``."""

    def write(self, byte_offset: int, data: memoryview) -> None:
        """Copy contiguous bytes."""
        with self.writable(byte_offset, len(data)) as target:
            target[:] = data

    @abstractmethod
    def scatter(self, byte_offset: int, elements: np.ndarray, byte_strides: tuple[int, ...]) -> None:
        """Copy an array of elements to strided positions.

        Args:
            byte_offset: of the first element.
            byte_strides: of the destination, one step in each dimension of ``elements``.
        """

    @abstractmethod
    def finish(self) -> None:
        """Return once everything that was written is in place."""


class HostMemory(Destination):
    """A `Destination` in this process's memory."""

    def __init__(self, memory: memoryview) -> None:
        self.memory = memory

    def writable(self, byte_offset: int, nbytes: int) -> AbstractContextManager[memoryview]:
        return nullcontext(self.memory[byte_offset : byte_offset + nbytes])

    def write(self, byte_offset: int, data: memoryview) -> None:
        self.memory[byte_offset : byte_offset + len(data)] = data

    def scatter(self, byte_offset: int, elements: np.ndarray, byte_strides: tuple[int, ...]) -> None:
        np.ndarray(elements.shape, elements.dtype, self.memory, byte_offset, byte_strides)[...] = elements

    def finish(self) -> None:
        """Writes are in place at once."""


class _StagingBuffer:
    """A pinned host buffer, and the end of the last copy out of it."""

    def __init__(self) -> None:
        self.memory = _NO_BYTES
        self.copied = torch.cuda.Event()


class _StagingBuffers(threading.local):
    """Each thread's own, the one that was used first in front."""

    def __init__(self) -> None:
        self.ring = deque(_StagingBuffer() for _ in range(_NUM_BUFFERS))


class DeviceMemory(Destination):
    """A `Destination` on a GPU. Each thread fills one of its pinned buffers while what it has filled before is copied.

    All copies are in one stream. A copy is waited for when its buffer is needed again, and by `finish`.

    Args:
        busy: clocks the waits for copies, and their starts.
    """

    def __init__(self, arena: DeviceArena, busy: BusyTimes) -> None:
        self._arena = arena
        self._busy = busy
        self._buffers = _StagingBuffers()
        self._stream = torch.cuda.Stream(arena.device)
        # The arena's memory may be that of a freed tensor, with which earlier work isn't done.
        self._stream.wait_stream(torch.cuda.current_stream(arena.device))

    @contextmanager
    def _staging(self, nbytes: int) -> Iterator[torch.Tensor]:
        """A pinned buffer to fill, which no copy reads from any more."""
        buffer = self._buffers.ring[0]
        self._buffers.ring.rotate(-1)
        with self._busy.at("device copy"):
            buffer.copied.synchronize()
        if buffer.memory.numel() < nbytes:
            buffer.memory = torch.empty(max(nbytes, _PINNED_BYTES), dtype=torch.uint8, pin_memory=True)
        yield buffer.memory[:nbytes]
        buffer.copied.record(self._stream)

    def _start_copy(self, target: torch.Tensor, staged: torch.Tensor) -> None:
        with self._busy.at("device copy"), torch.cuda.stream(self._stream):
            target.copy_(staged, non_blocking=True)

    @contextmanager
    def writable(self, byte_offset: int, nbytes: int) -> Iterator[memoryview]:
        with self._staging(nbytes) as staging:
            yield staging.numpy().data
            self._start_copy(self._arena.tensor(byte_offset, (nbytes,), torch.uint8), staging)

    def scatter(self, byte_offset: int, elements: np.ndarray, byte_strides: tuple[int, ...]) -> None:
        itemsize = elements.itemsize
        dtype = _TORCH_ELEMENT[itemsize]
        with self._staging(elements.nbytes) as staging:
            packed: np.ndarray[Any, Any] = staging.numpy().view(elements.dtype).reshape(elements.shape)
            np.copyto(packed, elements)
            all_elements = self._arena.tensor(0, (self._arena.nbytes // itemsize,), dtype)
            strides = [stride // itemsize for stride in byte_strides]
            target = torch.as_strided(all_elements, elements.shape, strides, byte_offset // itemsize)
            self._start_copy(target, staging.view(dtype).view(elements.shape))

    def finish(self) -> None:
        with self._busy.at("device copy"):
            self._stream.synchronize()


_NUMPY_ELEMENT = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}
_TORCH_ELEMENT = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def strided_view(
    memory: memoryview, *, byte_offset: int, sizes: tuple[int, ...], strides: tuple[int, ...], itemsize: int
) -> np.ndarray:
    """An array view of elements in memory, by their size alone; bit patterns are kept.

    Args:
        strides: elements.
        itemsize: bytes of an element: 1, 2, 4, 8 or 16.
    """
    byte_strides = tuple(stride * itemsize for stride in strides)
    return np.ndarray(sizes, _NUMPY_ELEMENT[itemsize], memory, byte_offset, byte_strides)


def destination_of(arena: Arena, busy: BusyTimes) -> Destination:
    """An arena as a destination of reads."""
    return HostMemory(arena.memory) if isinstance(arena, HostArena) else DeviceMemory(arena, busy)


def open_memory_file(pid: int, descriptor: int, inode: int) -> int:
    """A descriptor of a memory file that another process of this node has open.

    Raises:
        OSError: the process has ended, its memory is closed to this one, or the number stands for another file by now.
    """
    found = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
    if os.fstat(found).st_ino != inode:
        os.close(found)
        raise FileNotFoundError(errno.ENOENT, "another file has its number now", f"/proc/{pid}/fd/{descriptor}")
    return found


def view_bytes(memory: torch.Tensor, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """``shape`` elements of ``dtype`` from byte ``offset`` of a tensor of bytes, row-major, without a copy."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes == 0:
        return torch.empty(shape, dtype=dtype, device=memory.device)
    return memory[offset : offset + nbytes].view(dtype).view(shape)
