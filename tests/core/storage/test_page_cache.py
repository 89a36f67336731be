"""What the kernel says of its page cache, of a real file on a disk."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardferry.storage import page_cache
from shardferry.storage.page_cache import cached_pages, is_cached

PAGE, PAGES = mmap.PAGESIZE, 64


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    """Of a file that is on the disk, and not in the page cache."""
    file = tmp_path / "file"
    file.write_bytes(os.urandom(PAGES * PAGE))
    opened = os.open(file, os.O_RDONLY)
    os.fsync(opened)
    os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
    if is_cached(opened, 0):
        pytest.skip("this file system keeps all of its files in memory")
    yield opened
    os.close(opened)


def test_asking_fetches_nothing(descriptor: int) -> None:
    if cached_pages(descriptor, 0, PAGES * PAGE) is None:
        pytest.skip("this kernel has no cachestat")
    assert not any(is_cached(descriptor, page * PAGE) for page in range(PAGES))
    assert cached_pages(descriptor, 0, PAGES * PAGE) == 0


@pytest.mark.parametrize("has_cachestat", [True, False])
def test_what_was_read_is_there(descriptor: int, has_cachestat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_cachestat:
        monkeypatch.setattr(page_cache, "_CACHESTAT", 99_999)  # no call has this number
        assert cached_pages(descriptor, 0, PAGE) is None
    assert not is_cached(descriptor, 40 * PAGE + 1)
    os.pread(descriptor, PAGES * PAGE, 0)
    assert is_cached(descriptor, 40 * PAGE + 1)
    assert is_cached(descriptor, PAGES * PAGE - 1)
    assert not is_cached(descriptor, PAGES * PAGE), "behind the end"
