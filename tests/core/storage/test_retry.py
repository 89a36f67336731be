"""Which failures are tried again, how often, how long; on a clock that only these tests move, and against a real server."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from shardferry.errors import CheckpointNotFound, MissingFile, StorageError
from shardferry.stats import Counters
from shardferry.storage.base import OBJECT_STORE, RangeReader, StorageTraits
from shardferry.storage.obstore import open_location
from shardferry.storage.retry import Clock, RetryingReader, RetryPolicy, TransientStorageError, is_transient
from tests.support.range_server import Fault, served

DATA = bytes(range(256)) * 4_000
BUSY = TransientStorageError("ckpt/data: reading bytes 0 to 4 failed: 503 Service Unavailable")


@dataclass
class Time:
    """Passes only when somebody sleeps."""

    now_s: float = 100.0
    slept: list[float] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds

    def clock(self, random: Callable[[], float] = lambda: 1.0) -> Clock:
        return Clock(lambda: self.now_s, self.sleep, random)


@dataclass
class Flaky:
    """A storage of one file, which fails as it is told to before it serves."""

    failures: list[StorageError]
    location: str = "ckpt"
    traits: StorageTraits = OBJECT_STORE
    asked: list[tuple[int, int]] = field(default_factory=list)

    def _fail(self) -> None:
        if self.failures:
            raise self.failures.pop(0)

    def listing(self) -> dict[str, int | None]:
        self._fail()
        return {"data": len(DATA)}

    def versions(self) -> dict[str, str]:
        return {}

    def expect(self, versions: Mapping[str, str]) -> None:
        """No file has a version."""

    def size(self, path: str) -> int:
        self._fail()
        return len(DATA)

    def read_into(self, path: str, byte_offset: int, *buffers: memoryview) -> None:
        self.asked.append((byte_offset, byte_offset + sum(map(len, buffers))))
        self._fail()
        for buffer in buffers:
            buffer[:] = DATA[byte_offset : byte_offset + len(buffer)]
            byte_offset += len(buffer)

    def mapped(self, path: str, start: int, stop: int) -> memoryview:
        self.asked.append((start, stop))
        self._fail()
        return memoryview(DATA)[start:stop]

    def close(self) -> None:
        """Nothing is held."""


def opened(url: str, options: Mapping[str, Any]) -> RangeReader:
    storage = open_location(url, options)
    assert storage is not None
    return storage


def read(storage: RangeReader, start: int, stop: int) -> bytes:
    buffer = bytearray(stop - start)
    storage.read_into("data", start, memoryview(buffer))
    return bytes(buffer)


def test_waits_double_up_to_a_bound() -> None:
    time, flaky = Time(), Flaky([BUSY] * 6)
    policy = RetryPolicy(max_attempts=7, first_wait_s=0.5, max_wait_s=3.0)
    assert read(RetryingReader(flaky, policy, time.clock()), 3, 7) == DATA[3:7]
    assert time.slept == [0.5, 1.0, 2.0, 3.0, 3.0, 3.0]
    assert flaky.asked == [(3, 7)] * 7


def test_waits_are_drawn_from_none_to_the_longest() -> None:
    time, draws = Time(), iter([0.0, 0.25, 0.9])
    storage = RetryingReader(Flaky([BUSY] * 3), RetryPolicy(first_wait_s=1.0), time.clock(lambda: next(draws)))
    assert storage.size("data") == len(DATA)
    assert time.slept == [0.0, 0.5, 3.6]


def test_the_last_error_says_how_often_and_which_setting() -> None:
    time, flaky = Time(), Flaky([BUSY] * 9)
    says = r"^ckpt/data: .*503 Service Unavailable; tried 5 times in 3\.0 s \(read\.max_attempts is 5\)$"
    with pytest.raises(StorageError, match=says) as caught:
        read(RetryingReader(flaky, None, time.clock()), 0, 4)
    assert type(caught.value) is StorageError
    assert caught.value.__cause__ is BUSY
    assert len(flaky.asked) == 5


def test_one_attempt() -> None:
    time, flaky = Time(), Flaky([BUSY])
    with pytest.raises(StorageError, match=r"tried 1 time in 0\.0 s \(read\.max_attempts is 1\)"):
        RetryingReader(flaky, RetryPolicy(max_attempts=1), time.clock()).listing()
    assert time.slept == []


def test_no_attempt_begins_after_the_time_is_over() -> None:
    time, flaky = Time(), Flaky([BUSY] * 9)
    policy = RetryPolicy(max_attempts=100, first_wait_s=1.0, max_wait_s=8.0, max_elapsed_s=10.0)
    with pytest.raises(StorageError, match=r"tried 4 times in 7\.0 s \(no attempt begins 10 s after the first"):
        read(RetryingReader(flaky, policy, time.clock()), 0, 4)
    assert time.slept == [1.0, 2.0, 4.0]


@pytest.mark.parametrize(
    "error", [StorageError("4 bytes came"), MissingFile("data: the file is missing"), CheckpointNotFound("nowhere")]
)
def test_what_stays_is_an_error_at_once(error: StorageError) -> None:
    time, flaky = Time(), Flaky([error])
    with pytest.raises(type(error)) as caught:
        read(RetryingReader(flaky, None, time.clock()), 0, 4)
    assert caught.value is error
    assert (time.slept, len(flaky.asked)) == ([], 1)


def test_a_mapping_and_a_read_of_several_buffers_are_tried_again() -> None:
    time, flaky, buffers = Time(), Flaky([BUSY, BUSY]), [bytearray(3), bytearray(5)]
    storage = RetryingReader(flaky, None, time.clock())
    storage.read_into("data", 10, *map(memoryview, buffers))
    assert b"".join(buffers) == DATA[10:18] == storage.mapped("data", 10, 18)
    assert flaky.asked == [(10, 18)] * 4


class _WithStatus(Exception):
    def __init__(self, status: object) -> None:
        super().__init__(f"status {status}")
        self.status = status


def _caused(outer: Exception, cause: Exception) -> Exception:
    outer.__cause__ = cause
    return outer


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (TimeoutError(), True),
        (ConnectionResetError(), True),
        (OSError(errno.EIO, "i/o"), True),
        (OSError(errno.ESTALE, "stale"), True),
        (OSError(errno.ENOSPC, "no space"), False),
        (FileNotFoundError(), False),
        (PermissionError(), False),
        (_WithStatus(503), True),
        (_WithStatus("429"), True),
        (_WithStatus(501), False),
        (_WithStatus(403), False),
        (_caused(RuntimeError("outer"), TimeoutError()), True),
        (_caused(FileNotFoundError("outer"), TimeoutError()), False),
        (ValueError("nothing of the network"), False),
    ],
    ids=repr,
)
def test_errors_of_any_client(error: Exception, expected: bool) -> None:
    assert is_transient(error) is expected


# From here on: a real server, and obstore, whose text tells which error it is.

PASSING = [Fault.SERVER_ERROR, Fault.BUSY, Fault.TOO_MANY, Fault.RESET, Fault.CUT]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "data").write_bytes(DATA)
    return tmp_path


@pytest.mark.parametrize("fault", PASSING)
def test_the_server_is_asked_again(directory: Path, fault: Fault) -> None:
    time = Time()
    with served(directory, faults=[fault, fault]) as server:
        counters = Counters()
        policy = RetryPolicy(on_retry=counters.add_retry)
        storage = RetryingReader(opened(server.url, {}), policy, time.clock())
        assert read(storage, 1_000, 500_000) == DATA[1_000:500_000]
        assert counters.num_retries == 2
    assert server.ranges == [("data", 1_000, 500_000)] * 3
    assert [asked.fault for asked in server.log] == [fault, fault, None]
    assert time.slept == [0.2, 0.4]


@pytest.mark.parametrize("fault", PASSING)
def test_the_server_never_recovers(directory: Path, fault: Fault) -> None:
    with served(directory, faults=[fault] * 9) as server:
        storage = RetryingReader(opened(server.url, {}), RetryPolicy(max_attempts=3), Time().clock())
        with pytest.raises(StorageError, match=r"/data: reading bytes 0 to 100 failed: .*tried 3 times in 0\.6 s"):
            read(storage, 0, 100)
    assert len(server.log) == 3


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (Fault.SHORT, r"/data: reading bytes 0 to 100 failed: bytes 0 to 50 came; the file is cut"),
        (Fault.DENIED, r"/data: reading bytes 0 to 100 failed: access is refused; check the credentials"),
    ],
)
def test_the_server_means_it(directory: Path, fault: Fault, says: str) -> None:
    time = Time()
    with served(directory, faults=[fault]) as server:
        storage = RetryingReader(opened(server.url, {}), None, time.clock())
        with pytest.raises(StorageError, match=says):
            read(storage, 0, 100)
    assert (len(server.log), time.slept) == (1, [])


def test_a_server_that_takes_too_long(directory: Path) -> None:
    """Its answer comes after the client's patience: the time of a request is the client's, and real."""
    with served(directory, latency_s=0.5) as server:
        storage = RetryingReader(opened(server.url, {"timeout": "50ms"}), RetryPolicy(max_attempts=2), Time().clock())
        with pytest.raises(StorageError, match=r"/data: reading bytes 0 to 100 failed: .*tried 2 times"):
            read(storage, 0, 100)


def test_nobody_listens() -> None:
    time = Time()
    with served(Path()) as server:
        url = server.url
    with pytest.raises(StorageError, match=r"its size can't be found: .*tried 5 times"):
        RetryingReader(opened(url, {}), None, time.clock()).size("data")
