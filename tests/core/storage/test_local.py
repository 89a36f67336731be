"""How local files are read when it is asked for: past the page cache, with advice on it, with options that don't exist."""

from __future__ import annotations

import logging
import mmap
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardferry.checkpoint.open import open_checkpoint
from shardferry.errors import SpecError, StorageError
from shardferry.storage.local import (
    ALIGNMENT,
    BOUNCE_BYTES,
    LocalOptions,
    LocalReader,
    PageCache,
    open_direct,
    pread_direct,
)
from shardferry.storage.open import open_storage

DATA = np.random.default_rng(1).bytes(BOUNCE_BYTES + 3 * ALIGNMENT + 17)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "data").write_bytes(DATA)
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("start", "stop"),
    [
        (0, len(DATA)),
        (1, ALIGNMENT),
        (ALIGNMENT, 2 * ALIGNMENT),
        (ALIGNMENT - 1, ALIGNMENT + 1),
        (BOUNCE_BYTES - 5, BOUNCE_BYTES + 5),
        (7, BOUNCE_BYTES + 100),
        (len(DATA) - 17, len(DATA)),
        (len(DATA) - 1, len(DATA)),
    ],
)
def test_direct_reads(file: Path, start: int, stop: int) -> None:
    storage, buffer = LocalReader(file.parent, LocalOptions(direct_io=True)), bytearray(stop - start)
    storage.read_into("data", start, memoryview(buffer))
    storage.close()
    assert buffer == DATA[start:stop]


def test_nothing_is_left_after_the_end(file: Path) -> None:
    descriptor = open_direct(file)
    if descriptor is None:  # this file system refuses; the reads are aligned all the same
        descriptor = os.open(file, os.O_RDONLY)
    buffer, bounce = memoryview(bytearray(100)), memoryview(mmap.mmap(-1, BOUNCE_BYTES))
    assert pread_direct(descriptor, [buffer], len(DATA) - 5, bounce=bounce) == 5
    assert pread_direct(descriptor, [buffer], len(DATA), bounce=bounce) == 0
    assert pread_direct(descriptor, [buffer], len(DATA) + 10 * ALIGNMENT, bounce=bounce) == 0
    os.close(descriptor)


def test_a_file_system_that_refuses(caplog: pytest.LogCaptureFixture) -> None:
    """/proc has no direct I/O: the file is read all the same, and the log says how."""
    with caplog.at_level(logging.INFO, "shardferry.storage.local"):
        storage, buffer = open_storage("/proc/self", {"direct_io": True}), bytearray(7)
        storage.read_into("status", 0, memoryview(buffer))
        storage.close()
    assert buffer == b"Name:\tp"
    assert "/proc/self/status: no direct I/O on this file system" in caplog.text


@pytest.mark.parametrize("advice", PageCache)
def test_advice_changes_no_byte(file: Path, advice: PageCache) -> None:
    storage, buffer = open_storage(file.parent, {"page_cache": advice.value}), bytearray(10_000)
    storage.read_into("data", 5, memoryview(buffer))
    storage.close()
    assert buffer == DATA[5:10_005]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"region": "r"}, r"local files have no option 'region'; they have direct_io and page_cache"),
        ({"direct_io": "yes"}, r"direct_io is 'yes'; it is true or false"),
        ({"direct_io": "auto"}, r"direct_io is 'auto'; it is true or false"),
        ({"direct_io": 1}, r"direct_io is 1; it is true or false"),
        ({"page_cache": "wish"}, r"page_cache is 'wish'; it is one of keep, read_ahead, drop"),
    ],
)
def test_options_that_nobody_knows(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        open_storage(tmp_path, options)


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


SPECIAL = [
    pytest.param(make_fifo, "is a FIFO, not a regular file", id="fifo"),
    pytest.param(make_socket, "is a socket, or a device without a driver, not", id="socket"),
    pytest.param(make_device, "is a character device, not a regular file", id="device"),
    pytest.param(Path.mkdir, "is a directory, not a regular file", id="directory"),
]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("direct_io", [False, True])
@pytest.mark.parametrize(("make", "says"), SPECIAL)
def test_what_is_no_file_is_refused_at_once(
    tmp_path: Path, make: Callable[[Path], None], says: str, direct_io: bool
) -> None:
    make(tmp_path / "data")
    storage = LocalReader(tmp_path, LocalOptions(direct_io=direct_io))
    with pytest.raises(StorageError, match=f"/data: {says}"):
        storage.read_into("data", 0, memoryview(bytearray(4)))
    storage.close()


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("make", "says"), SPECIAL[:3])
def test_metadata_that_is_no_file(tmp_path: Path, make: Callable[[Path], None], says: str) -> None:
    make(tmp_path / ".metadata")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(StorageError, match=rf"/\.metadata: {says}"):
        open_checkpoint(tmp_path)
