"""Past the page cache or through it, where that is left to a probe: what is decided by which rates, and what is read then."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from benchmarks.stores import resident_share
from shardferry.errors import StorageError
from shardferry.storage import LocalReader
from shardferry.storage import direct_choice as choice
from shardferry.storage.direct import open_direct
from shardferry.storage.direct_choice import MIN_FILE_BYTES, PIECE_BYTES, DirectChoice, Rates
from shardferry.storage.local import LocalOptions, PageCache
from shardferry.storage.page_cache import is_cached

BLOCK = np.random.default_rng(2).bytes(PIECE_BYTES + 4096)
FILES = {"long": MIN_FILE_BYTES, "short": len(BLOCK)}  # bytes
RANGES = [(0, 5), (4_095, 300_000), (PIECE_BYTES - 1, 4 * PIECE_BYTES), (MIN_FILE_BYTES - 7, MIN_FILE_BYTES)]


def saved_bytes(start: int, stop: int) -> bytes:
    """Part of a file: the block again and again. No file is read for it, which would bring it into memory."""
    first = start % len(BLOCK)
    return (BLOCK * ((stop - start) // len(BLOCK) + 2))[first : first + stop - start]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files, one of which is long enough for a probe."""
    directory = tmp_path_factory.mktemp("direct")
    for name, nbytes in FILES.items():
        (directory / name).write_bytes(saved_bytes(0, nbytes))
    return directory


@pytest.fixture
def cold(saved: Path) -> Path:
    for file in saved.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        is_there = is_cached(descriptor, 0)
        os.close(descriptor)
        if is_there:
            pytest.skip("this file system keeps its files in memory")
    return saved


@pytest.fixture
def storage(saved: Path) -> Iterator[LocalReader]:
    opened = LocalReader(saved, LocalOptions(direct_io="auto"))
    yield opened
    opened.close()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "shardferry.storage")
    return caplog


def read(storage: LocalReader, path: str, start: int, stop: int) -> bytes:
    buffer = bytearray(stop - start)
    storage.read_into(path, start, memoryview(buffer))
    return bytes(buffer)


def check_reads(storage: LocalReader, path: str = "long") -> None:
    for start, stop in RANGES:
        if stop <= FILES[path]:
            assert read(storage, path, start, stop) == saved_bytes(start, stop)


@pytest.mark.parametrize(
    ("direct", "cached", "favours_direct"),
    [(2e9, 1e9, True), (1e9, 1e9, False), (1.4e9, 1e9, False), (1e9, 2e9, False), (0.0, 0.0, False), (1.0, 0.0, True)],
)
def test_what_is_clearly_quicker(direct: float, cached: float, favours_direct: bool) -> None:
    assert Rates(direct=direct, cached=cached).favour_direct == favours_direct


def test_the_quicker_way_is_taken_and_logged(cold: Path, storage: LocalReader, log: pytest.LogCaptureFixture) -> None:
    if (descriptor := open_direct(cold / "long")) is None:
        pytest.skip("this file system refuses direct I/O")
    os.close(descriptor)
    check_reads(storage)
    [said] = log.messages
    found = re.fullmatch(
        r".*/long: direct I/O gives \d+ MB/s, the page cache \d+ MB/s; reading (past|through) the page cache", said
    )
    assert found is not None, said
    assert storage.traits.shares_reads == (found[1] == "through")


@pytest.mark.parametrize(("clearly", "is_direct"), [(0.0, True), (float("inf"), False)])
def test_all_files_are_read_as_was_decided(
    cold: Path, storage: LocalReader, monkeypatch: pytest.MonkeyPatch, clearly: float, is_direct: bool
) -> None:
    """Also one that was opened, and read from, before anything was decided."""
    monkeypatch.setattr(choice, "_CLEARLY", clearly)
    check_reads(storage, "short")
    assert not storage.traits.shares_reads, "nothing is known yet"
    check_reads(storage, "long")
    assert storage.traits.shares_reads == (not is_direct)
    for path in ("short", "long"):
        check_reads(storage, path)
        assert storage.is_in_memory(path, 0) == (not is_direct)


def test_the_probe_leaves_little_in_memory(cold: Path, storage: LocalReader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what it reads goes through the page cache, and nothing is read ahead."""
    monkeypatch.setattr(choice, "_CLEARLY", 0.0)
    assert read(storage, "long", 5, 10) == saved_bytes(5, 10)
    assert 0 < resident_share(str(cold)) * sum(FILES.values()) <= 4 * PIECE_BYTES


def test_many_threads_decide_once(cold: Path, storage: LocalReader, log: pytest.LogCaptureFixture) -> None:
    starts = range(0, 16 * PIECE_BYTES, PIECE_BYTES // 2)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda start: read(storage, "long", start, start + PIECE_BYTES // 2), starts))
    assert b"".join(found) == saved_bytes(0, 16 * PIECE_BYTES)
    assert len(log.messages) == 1


def test_what_is_in_memory_is_read_there(saved: Path, storage: LocalReader, log: pytest.LogCaptureFixture) -> None:
    (saved / "long").read_bytes()
    check_reads(storage)
    assert log.messages == [f"{saved}/long: 16 of 16 places are in memory; reading through the page cache"]
    assert storage.traits.shares_reads


def test_a_file_system_that_refuses(cold: Path, log: pytest.LogCaptureFixture) -> None:
    """/proc refuses, and its files are too short to be asked: so the long file's bytes stand in for those of one of its own."""
    decided, descriptor = DirectChoice("auto"), os.open(cold / "long", os.O_RDONLY)
    decided.decide(Path("/proc/self/status"), descriptor)
    os.close(descriptor)
    assert decided.is_direct is False
    assert log.messages[-1] == "/proc/self/status: the file system refuses direct I/O; reading through the page cache"


def test_a_short_file_decides_nothing(cold: Path, storage: LocalReader, log: pytest.LogCaptureFixture) -> None:
    check_reads(storage, "short")
    assert not log.messages


@pytest.mark.parametrize("direct_io", [True, False])
def test_nothing_is_asked_where_it_is_given(cold: Path, direct_io: bool, log: pytest.LogCaptureFixture) -> None:
    storage = LocalReader(cold, LocalOptions(direct_io=direct_io))
    check_reads(storage)
    assert storage.traits.shares_reads == (not direct_io)
    assert "MB/s" not in log.text
    storage.close()


@pytest.mark.parametrize(("advice", "shares_reads"), [("keep", True), ("read_ahead", True), ("drop", False)])
def test_what_is_dropped_is_there_for_nobody(saved: Path, advice: str, shares_reads: bool) -> None:
    assert LocalReader(saved, LocalOptions(page_cache=PageCache(advice))).traits.shares_reads == shares_reads


def test_a_file_that_is_replaced_before_it_is_opened_again(
    tmp_path: Path, cold: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Direct I/O takes another descriptor: that one must be of the catalog's file too."""
    monkeypatch.setattr(choice, "_CLEARLY", 0.0)
    (tmp_path / "long").symlink_to(cold / "long")
    (tmp_path / "short").write_bytes(BLOCK)
    storage = LocalReader(tmp_path, LocalOptions(direct_io="auto"))
    storage.listing()
    storage.expect(storage.versions())
    check_reads(storage, "short")
    (tmp_path / "other").write_bytes(BLOCK[::-1])
    (tmp_path / "other").replace(tmp_path / "short")
    check_reads(storage, "long")
    with pytest.raises(StorageError, match=r"/short: its version is .*it was written again since"):
        read(storage, "short", 0, 5)
    storage.close()
