"""One allocation a rank, into which everything is read and from which every tensor is a view.

On the host it is an anonymous memory file: other processes of the node can map it through ``/proc/<pid>/fd``, and it is
gone when the last of them is. On a GPU it is one tensor of bytes.
"""

from __future__ import annotations

import errno
import fcntl
import math
import mmap
import os
import threading
from abc import ABC, abstractmethod
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
NAME = "shardferry-arena"  # as /proc shows it: memfd:shardferry-arena
_PINNED_BYTES = 16 * 1024 * 1024  # of each reading thread's staging buffer, for GPU arenas


def host_identity() -> str:
    """Names this machine and process namespace: where it is equal, ``/proc/<pid>`` means the same process."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{Path('/proc/self/ns/pid').stat().st_ino}"


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


def check_host_room(arenas_bytes: Sequence[int], *, available_bytes: int, host: str) -> None:
    """Raise ArenaError, before any arena takes memory, if the host has less than all of them need."""
    needed = sum(arenas_bytes)
    if needed > available_bytes:
        raise ArenaError(
            f"host {host}: {len(arenas_bytes)} arena(s) need {needed} bytes, {available_bytes} are available: "
            f"{needed - available_bytes} bytes are missing. Spread the ranks over more hosts or use more ranks."
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

    def freeze(self) -> None:
        """Make the bytes immutable for everybody: unmap them here and let the kernel refuse every later write."""
        self.detach()
        with suppress(OSError):  # still mapped where somebody kept a view: then only promised, not enforced
            fcntl.fcntl(
                self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
            )

    def detach(self) -> None:
        """Drop this object's own mapping; tensors made before keep theirs, and so does the memory file."""
        self._bytes = _NO_BYTES
        self.memory = memoryview(b"")
        self.directory = _NOWHERE

    def close(self) -> None:
        """Give the memory back, unless a tensor or another process still uses it."""
        self.detach()
        if getattr(self, "descriptor", -1) >= 0:  # -1: `__init__` has failed early
            os.close(self.descriptor)
            self.descriptor = -1

    __del__ = close


class DeviceArena(_Bytes):
    """Bytes on a GPU, filled through pinned host buffers, one for each reading thread."""

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
        self._buffers = threading.local()

    @contextmanager
    def staging(self, nbytes: int) -> Iterator[torch.Tensor]:
        """This thread's pinned host buffer. Its copies to the device are waited for by `wait_for_copies`."""
        buffer: torch.Tensor | None = getattr(self._buffers, "pinned", None)
        if buffer is None or buffer.numel() < nbytes:
            buffer = torch.empty(max(nbytes, _PINNED_BYTES), dtype=torch.uint8, pin_memory=True)
            self._buffers.pinned = buffer
            self._buffers.stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._buffers.stream):
            yield buffer[:nbytes]

    def wait_for_copies(self) -> None:
        """Until what this thread has copied to the device has arrived."""
        self._buffers.stream.synchronize()

    def close(self) -> None:
        """Forget the memory; tensors made before keep it."""
        self._bytes = _NO_BYTES


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


class DeviceMemory(Destination):
    """A `Destination` on a GPU: bytes go through a pinned staging buffer.

    Args:
        busy: clocks the copies to the device.
    """

    def __init__(self, arena: DeviceArena, busy: BusyTimes) -> None:
        self._arena = arena
        self._busy = busy

    @contextmanager
    def writable(self, byte_offset: int, nbytes: int) -> Iterator[memoryview]:
        with self._arena.staging(nbytes) as staging:
            yield staging.numpy().data
            with self._busy.at("device copy"):
                self._arena.tensor(byte_offset, (nbytes,), torch.uint8).copy_(staging, non_blocking=True)
                self._arena.wait_for_copies()

    def scatter(self, byte_offset: int, elements: np.ndarray, byte_strides: tuple[int, ...]) -> None:
        itemsize = elements.itemsize
        dtype = _TORCH_ELEMENT[itemsize]
        with self._arena.staging(elements.nbytes) as staging:
            packed: np.ndarray[Any, Any] = staging.numpy().view(elements.dtype).reshape(elements.shape)
            np.copyto(packed, elements)
            with self._busy.at("device copy"):
                all_elements = self._arena.tensor(0, (self._arena.nbytes // itemsize,), dtype)
                strides = [stride // itemsize for stride in byte_strides]
                target = torch.as_strided(all_elements, elements.shape, strides, byte_offset // itemsize)
                target.copy_(staging.view(dtype).view(elements.shape), non_blocking=True)
                self._arena.wait_for_copies()


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
