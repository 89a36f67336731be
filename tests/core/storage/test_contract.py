"""The same contract for every storage: what is listed, which bytes come, and what is said where they can't."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from shardferry.checkpoint.open import open_checkpoint
from shardferry.errors import CheckpointNotFound, MissingFile, StorageError
from shardferry.storage.base import RangeReader
from shardferry.storage.fsspec import FsspecRangeReader
from shardferry.storage.open import open_storage
from shardferry.storage.retry import RetryingReader
from tests.support.range_server import served
from tests.support.s3_server import BUCKET, S3Server

FILES = {
    ".metadata": b"m" * 100,
    "__0_0.distcp": np.random.default_rng(0).bytes(300_000),
    "__1_0.distcp": bytes(range(256)),
    "empty": b"",
}
BIG = "__0_0.distcp"


@dataclass(frozen=True)
class Place:
    """A directory of some storage."""

    location: str | Path
    opened: Callable[[], RangeReader]
    write: Callable[[str, bytes], object]
    options: dict[str, Any] = field(default_factory=dict)


KINDS = [
    "path",
    "direct I/O",
    "file://",
    "memory://",
    "s3://",
    "pyarrow's S3",
    "pyarrow's local filesystem",
    "pyarrow around fsspec",
    "http://",
    "http:// by fsspec",
    "fsspec's local filesystem",
]


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "directory").mkdir()

    def write(name: str, data: bytes) -> None:
        (tmp_path / name).write_bytes(data)

    def at(location: str | Path, write: Callable[[str, bytes], object] = write, **options: Any) -> Place:
        return Place(location, lambda: open_storage(location, options), write, options)

    match request.param:
        case "path":
            yield at(tmp_path)
        case "direct I/O":
            yield at(tmp_path, direct_io=True, page_cache="drop")
        case "file://":
            yield at(tmp_path.as_uri(), page_cache="read_ahead")
        case "fsspec's local filesystem":
            yield Place(
                tmp_path.as_uri(), lambda: RetryingReader(FsspecRangeReader(LocalFileSystem(), str(tmp_path))), write
            )
        case "http://":
            with served(tmp_path) as server:
                yield at(server.url)
        case "http:// by fsspec":
            with served(tmp_path) as server:
                yield at(server.url, client="fsspec")
        case "s3://":
            s3, prefix = in_s3(request)
            yield at(f"s3://{BUCKET}/{prefix}", lambda name, data: s3.put(prefix, {name: data}), **s3.options)
        case "pyarrow's S3":
            pytest.importorskip("pyarrow")
            s3, prefix = in_s3(request)

            def write_later(name: str, data: bytes) -> None:
                time.sleep(1.1)  # it tells times of change to the second
                s3.put(prefix, {name: data})

            yield at(f"{BUCKET}/{prefix}", write_later, filesystem=s3.filesystem())
        case "pyarrow's local filesystem":
            fs = pytest.importorskip("pyarrow.fs")
            below = fs.SubTreeFileSystem(str(tmp_path.parent), fs.LocalFileSystem())
            yield at(tmp_path.name, filesystem=below)
        case "pyarrow around fsspec":
            fs = pytest.importorskip("pyarrow.fs")
            memory, path = fsspec.filesystem("memory"), f"/{uuid.uuid4()}/ckpt"
            for name, data in FILES.items():
                memory.pipe_file(f"{path}/{name}", data)
            around = fs.PyFileSystem(fs.FSSpecHandler(memory))
            yield at(path, lambda name, data: memory.pipe_file(f"{path}/{name}", data), filesystem=around)
            memory.rm(path.rpartition("/")[0], recursive=True)
        case _:
            memory, url = fsspec.filesystem("memory"), f"memory://{uuid.uuid4()}/ckpt"
            for name, data in FILES.items():
                memory.pipe_file(f"{url}/{name}", data)
            memory.makedirs(f"{url}/directory")
            yield at(url, lambda name, data: memory.pipe_file(f"{url}/{name}", data))
            memory.rm(url.rpartition("/")[0], recursive=True)


def in_s3(request: pytest.FixtureRequest) -> tuple[S3Server, str]:
    """A server that has the files, and where in its bucket."""
    s3: S3Server = request.getfixturevalue("s3")
    prefix = f"{uuid.uuid4()}/step 1"  # a space, as anything may be in a key
    s3.put(prefix, {**FILES, "directory/inside": b"x"})
    return s3, prefix


@pytest.fixture
def storage(place: Place) -> Iterator[RangeReader]:
    opened = place.opened()
    yield opened
    opened.close()


def read(storage: RangeReader, path: str, start: int, stop: int) -> bytes:
    buffer = bytearray(stop - start)
    storage.read_into(path, start, memoryview(buffer))
    return bytes(buffer)


def fetch(storage: RangeReader, path: str, start: int, stop: int) -> bytes:
    """As the read engine does: through a mapping where the storage has one."""
    return bytes(storage.mapped(path, start, stop)) if storage.traits.maps_files else read(storage, path, start, stop)


def test_the_listing_is_of_the_files_in_order(storage: RangeReader) -> None:
    if not storage.traits.has_listing:
        with pytest.raises(StorageError, match=r"http://.*: a web server doesn't list its files"):
            storage.listing()
        return
    listing = storage.listing()
    assert list(listing) == sorted(FILES)
    assert all(size in (None, len(FILES[name])) for name, size in listing.items())
    assert None not in listing.values() or storage.location.startswith("http://")


def test_the_location_opens_the_same_storage(place: Place, storage: RangeReader) -> None:
    again = open_storage(storage.location, storage.options)
    assert again.location.removeprefix("file://") == storage.location.removeprefix("file://")
    assert again.size(BIG) == 300_000
    again.close()


@pytest.mark.parametrize("name", FILES)
def test_sizes(storage: RangeReader, name: str) -> None:
    assert storage.size(name) == len(FILES[name])


@pytest.mark.parametrize(("start", "stop"), [(0, 300_000), (0, 1), (299_999, 300_000), (4_095, 200_001), (7, 7)])
def test_ranges(storage: RangeReader, start: int, stop: int) -> None:
    assert read(storage, BIG, start, stop) == FILES[BIG][start:stop]


@pytest.mark.parametrize("sizes", [(5, 20), (0, 100, 0, 7), (1,) * 9, (4_096, 200_000, 1)], ids=str)
def test_several_buffers_are_one_request(storage: RangeReader, sizes: tuple[int, ...]) -> None:
    buffers = [bytearray(size) for size in sizes]
    storage.read_into(BIG, 1_001, *map(memoryview, buffers))
    assert b"".join(buffers) == FILES[BIG][1_001 : 1_001 + sum(sizes)]


def test_files_are_mapped_or_not(storage: RangeReader) -> None:
    if storage.traits.maps_files:
        assert storage.mapped(BIG, 4_095, 9_000) == FILES[BIG][4_095:9_000]
    else:
        with pytest.raises(StorageError, match="its files can't be mapped into memory"):
            storage.mapped(BIG, 4_095, 9_000)


@pytest.mark.parametrize(("start", "stop"), [(250, 257), (256, 260), (1_000, 1_010)])
def test_a_file_that_ends_too_soon(storage: RangeReader, start: int, stop: int) -> None:
    with pytest.raises(StorageError, match=rf"__1_0\.distcp.*{start}.*{stop}"):
        read(storage, "__1_0.distcp", start, stop)
    with pytest.raises(StorageError, match=rf"__1_0\.distcp.* bytes {start} to {stop}"):
        fetch(storage, "__1_0.distcp", start, stop)


def test_a_file_that_is_not_there(storage: RangeReader) -> None:
    says = r"__7_0\.distcp: the file is missing, but the metadata says that it holds saved data"
    with pytest.raises(MissingFile, match=says):
        storage.size("__7_0.distcp")
    with pytest.raises(StorageError, match=says):
        read(storage, "__7_0.distcp", 0, 4)
    with pytest.raises(StorageError, match=says):
        fetch(storage, "__7_0.distcp", 0, 4)


def test_a_directory_that_is_not_there(place: Place) -> None:
    with pytest.raises(CheckpointNotFound, match=r"nowhere: no (such directory|\.metadata file, and no )"):
        open_checkpoint(f"{place.location}/nowhere", storage_options=place.options)


def test_a_file_that_is_written_again(place: Place) -> None:
    """As long as before, so that only its version tells; a file without one, and a reader of now, see what there is."""
    before, now = place.opened(), place.opened()
    if before.traits.has_listing:
        before.listing()
    before.size(BIG)
    versions = before.versions()
    before.expect(versions)
    changed = FILES[BIG][::-1]
    place.write(BIG, changed)
    assert read(now, BIG, 5, 10) == changed[5:10]
    if BIG in versions:
        says = r"__0_0\.distcp: its version is .*it was written again since"
        with pytest.raises(StorageError, match=says):
            read(before, BIG, 5, 10)
        with pytest.raises(StorageError, match=says):
            fetch(before, BIG, 0, 13)
    else:
        assert before.location.startswith("memory://") or place.options == {"client": "fsspec"}
    before.close()
    now.close()


def test_threads(storage: RangeReader) -> None:
    starts = range(0, 300_000, 1_000)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda start: read(storage, BIG, start, start + 1_000), starts))
    assert b"".join(found) == FILES[BIG]


def test_closing_one_leaves_the_other_open(place: Place) -> None:
    one, other = place.opened(), place.opened()
    assert read(one, BIG, 0, 10) == read(other, BIG, 0, 10)
    one.close()
    assert read(other, BIG, 10, 20) == FILES[BIG][10:20]
    other.close()
