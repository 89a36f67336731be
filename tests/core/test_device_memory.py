"""Writes to a GPU's arena through pinned buffers: when each copy is waited for, with copies that happen as late as they may."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from shardferry import arena as module
from shardferry.arena import DeviceArena, DeviceMemory
from shardferry.stats import BusyTimes


class LateCopies:
    """CUDA as far as `DeviceMemory` needs it. A copy happens when an event after it, or the stream, is waited for."""

    def __init__(self) -> None:
        self.started = 0
        self.done = 0
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._lock = threading.Lock()

    def start(self, target: torch.Tensor, staged: torch.Tensor) -> None:
        with self._lock:
            self._copies.append((target, staged))
            self.started += 1

    def wait_until(self, count: int) -> None:
        with self._lock:
            while self.done < count:
                target, staged = self._copies[self.done]
                target.copy_(staged)
                self.done += 1


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> LateCopies:
    late = LateCopies()

    class Stream:
        def __init__(self, device: torch.device) -> None: ...

        def wait_stream(self, other: object) -> None: ...

        def synchronize(self) -> None:
            late.wait_until(late.started)

    class Event:
        recorded = 0

        def record(self, stream: Stream) -> None:
            self.recorded = late.started

        def synchronize(self) -> None:
            late.wait_until(self.recorded)

    @contextmanager
    def stream(_: Stream) -> Iterator[None]:
        yield

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, pin_memory=False, **options: empty(*sizes, **options))
    return late


def device_memory(cuda: LateCopies, nbytes: int) -> tuple[DeviceMemory, torch.Tensor]:
    class OnDevice(torch.Tensor):
        def copy_(self, staged: torch.Tensor, non_blocking: bool = False) -> Any:  # type: ignore[override]
            assert non_blocking
            cuda.start(self.as_subclass(torch.Tensor), staged)

    arena = DeviceArena(nbytes, torch.device("cpu"))
    bytes_of_device = arena.as_bytes().zero_()
    arena._bytes = bytes_of_device.as_subclass(OnDevice)
    return DeviceMemory(arena, BusyTimes()), bytes_of_device


def test_a_copy_is_waited_for_when_its_buffer_is_needed_again(cuda: LateCopies) -> None:
    memory, found = device_memory(cuda, 1000)
    expected = torch.zeros(1000, dtype=torch.uint8)
    done = []
    for number in range(6):
        content = np.full(100, number + 1, dtype=np.uint8)
        memory.write(100 * number, content.data)
        expected[100 * number : 100 * number + 100] = number + 1
        done.append(cuda.done)
    assert cuda.started == 6
    assert done == [max(0, number - module._NUM_BUFFERS + 1) for number in range(6)], "others are still under way"
    memory.finish()
    assert torch.equal(found, expected)


def test_a_larger_write_gets_a_larger_buffer(cuda: LateCopies, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PINNED_BYTES", 16)
    memory, found = device_memory(cuda, 1000)
    contents = [np.random.default_rng(n).integers(0, 256, n, dtype=np.uint8) for n in (10, 16, 17, 300, 5, 200)]
    start = 0
    for content in contents:
        memory.write(start, content.data)
        start += len(content)
    memory.finish()
    assert found[:start].numpy().tobytes() == b"".join(content.tobytes() for content in contents)


def test_strided_boxes_from_several_threads(cuda: LateCopies) -> None:
    """Columns of a matrix of int32, one thread for each two."""
    rows, columns = 50, 8
    memory, found = device_memory(cuda, rows * columns * 4)
    matrix = np.random.default_rng(3).integers(-(2**31), 2**31, (rows, columns), dtype=np.int32)

    def write(first: int) -> None:
        for column in (first, first + 1):
            for top in range(0, rows, 10):
                memory.scatter(
                    4 * (top * columns + column), matrix[top : top + 10, column].view(np.uint32), (4 * columns,)
                )

    threads = [threading.Thread(target=write, args=(first,)) for first in range(0, columns, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    memory.finish()
    assert np.array_equal(found.view(torch.int32).view(rows, columns).numpy(), matrix)


def test_a_write_that_fails_starts_no_copy(cuda: LateCopies) -> None:
    memory, found = device_memory(cuda, 100)

    def read_too_little() -> None:
        with memory.writable(0, 100) as target:
            target[:] = bytes([9]) * 100
            raise OSError("short")

    with pytest.raises(OSError, match="short"):
        read_too_little()
    memory.finish()
    assert (cuda.started, found.any().item()) == (0, False)
