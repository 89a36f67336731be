"""Whole checkpoints through fsspec: the same bits as from a directory, and no more bytes asked for than are needed."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

from shardferry.checkpoint.open import open_checkpoint, read_catalog, storage_of
from shardferry.errors import CheckpointNotFound, StorageError
from shardferry.read.execute import check_files
from shardferry.read.verify import verify_checkpoint
from shardferry.region import Region
from shardferry.storage.fsspec import FsspecRangeReader
from shardferry.storage.open import open_storage
from tests.support.alone import save_alone
from tests.support.loads import load_boxes, load_whole
from tests.support.oracle import full_tensor
from tests.support.range_server import served

SHAPES = {"matrix": (96, 64), "vector": (1000,), "cube": (6, 8, 10), "scalar": ()}


def state() -> dict[str, Any]:
    return {"optim": {fqn: full_tensor(fqn, "exp_avg", shape) for fqn, shape in SHAPES.items()}, "epoch": 3}


@pytest.fixture
def memory_url() -> Iterator[str]:
    url = f"memory://{uuid.uuid4()}"
    yield f"{url}/step-1"
    fsspec.filesystem("memory").rm(url, recursive=True)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_alone(state(), tmp_path / "ckpt", storage_writer=FileSystemWriter(tmp_path / "ckpt", thread_count=2))
    return tmp_path / "ckpt"


def test_what_torch_wrote_through_fsspec(memory_url: str) -> None:
    save_alone(state(), memory_url, storage_writer=FsspecWriter(memory_url))
    catalog = open_checkpoint(memory_url)
    found = load_whole(catalog)
    assert set(found) == {f"optim.{fqn}" for fqn in SHAPES}
    for fqn, shape in SHAPES.items():
        assert torch.equal(found[f"optim.{fqn}"], full_tensor(fqn, "exp_avg", shape)), fqn
    assert verify_checkpoint(catalog, storage_of(catalog), concurrency=2) == []


def test_the_filesystem_that_torch_s_reader_was_given(memory_url: str) -> None:
    save_alone(state(), memory_url, storage_writer=FsspecWriter(memory_url))
    reader = FsspecReader(memory_url)
    storage = FsspecRangeReader(reader.fs.fs, str(reader.path))
    found, _ = load_boxes(
        read_catalog(storage, cache=None), [("optim.matrix", Region((3, 5), (40, 20)))], storage=storage
    )
    assert torch.equal(found[0], full_tensor("matrix", "exp_avg", SHAPES["matrix"])[3:43, 5:25])


BOTH_CLIENTS = pytest.mark.parametrize("client", ["obstore", "fsspec"])


@BOTH_CLIENTS
def test_a_web_server_is_asked_for_what_is_counted(directory: Path, client: str) -> None:
    with served(directory) as server:
        catalog = open_checkpoint(server.url, storage_options={"client": client})
        server.log.clear()
        found, counters = load_boxes(catalog, [("optim.matrix", Region((48, 0), (24, 64)))])
    assert torch.equal(found[0], full_tensor("matrix", "exp_avg", SHAPES["matrix"])[48:72])
    assert len(server.ranges) == counters.num_requests == 1
    assert sum(stop - start for _, start, stop in server.ranges) == counters.bytes_requested == 72 * 64 * 4 + 704


@BOTH_CLIENTS
def test_runs_far_apart_are_fetched_alone(tmp_path: Path, client: str) -> None:
    """A column of a wide matrix: its window is 200 times as wide as what is wanted."""
    save_alone({"wide": full_tensor("wide", "exp_avg", (12, 40_000))}, tmp_path / "ckpt")
    with served(tmp_path / "ckpt") as server:
        catalog = open_checkpoint(server.url, storage_options={"client": client})
        server.log.clear()
        found, counters = load_boxes(catalog, [("wide", Region((0, 7), (12, 200)))])
    assert torch.equal(found[0], full_tensor("wide", "exp_avg", (12, 40_000))[:, 7:207])
    assert counters.bytes_requested == sum(stop - start for _, start, stop in server.ranges) == 12 * 200 * 4 + 704 + 28
    assert counters.num_requests == len(server.ranges) == 12, "the head comes with the first"


@BOTH_CLIENTS
def test_a_server_without_ranges(directory: Path, client: str) -> None:
    with served(directory, serves_ranges=False) as server:
        storage = open_storage(server.url, {"client": client})
        with pytest.raises(StorageError, match=r"bytes 10 to 20.*the storage doesn't serve ranges"):
            storage.read_into("__0_0.distcp", 10, memoryview(bytearray(10)))


class _FileOfRanges(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        self.fs.fetched.append((start, end))
        return bytes(self.fs.data[start:end])


class FilesOnly(AbstractFileSystem):
    """A backend that has no ranges of its own: only files, which fsspec reads ahead."""

    protocol = "files-only"
    cachable = False
    data = bytes(range(256)) * 8_000

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.fetched: list[tuple[int, int]] = []

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": path, "size": len(self.data), "type": "file"}

    def _open(self, path: str, mode: str = "rb", **options: Any) -> _FileOfRanges:
        return _FileOfRanges(self, path, mode, size=len(self.data), **options)


def test_nothing_is_read_ahead() -> None:
    filesystem = FilesOnly()
    storage, buffer = FsspecRangeReader(filesystem, "ckpt"), bytearray(100)
    storage.read_into("data", 1_000, memoryview(buffer))
    assert (bytes(buffer), filesystem.fetched) == (FilesOnly.data[1_000:1_100], [(1_000, 1_100)])


class Locked(MemoryFileSystem):
    """Opens for those who have the key."""

    protocol = "locked"
    cachable = False

    def __init__(self, *, key: str = "", **options: Any) -> None:
        super().__init__(**options)
        if key != "sesame":
            raise PermissionError("the key is wrong")

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.removeprefix("locked://"))


def test_storage_options_go_with_the_catalog(memory_url: str) -> None:
    save_alone(state(), memory_url, storage_writer=FsspecWriter(memory_url))
    fsspec.register_implementation("locked", Locked, clobber=True)
    url = memory_url.replace("memory://", "locked://")
    with pytest.raises(CheckpointNotFound, match=r"locked:// can't be opened: PermissionError: the key is wrong"):
        open_checkpoint(url)
    catalog = open_checkpoint(url, storage_options={"key": "sesame"})
    assert "sesame" not in repr(catalog)
    assert torch.equal(load_whole(catalog)["optim.vector"], full_tensor("vector", "exp_avg", (1000,)))


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("warp://bucket/ckpt", r"^warp://bucket/ckpt: warp:// can't be opened: .*[Pp]rotocol not known: warp"),
        ("sftp://host/ckpt", r"^sftp://host/ckpt: sftp:// needs a package that is not installed: .*paramiko"),
    ],
)
def test_kinds_of_urls_that_cannot_be_opened(url: str, says: str) -> None:
    with pytest.raises(CheckpointNotFound, match=says):
        open_checkpoint(url)


@pytest.mark.parametrize("change", [-5, +5])
def test_a_file_that_is_written_again_after_the_catalog_was_read(directory: Path, change: int) -> None:
    catalog = open_checkpoint(directory)
    file = directory / catalog.files[int(catalog.chunk_file[catalog.tensors["optim.matrix"].chunks[0]])]
    data = file.read_bytes()
    file.write_bytes(data[:change] if change < 0 else data + bytes(change))
    says = re.escape(str(file)) + (
        r".*the file is cut" if change < 0 else rf" has {len(data) + 5} bytes, it had {len(data)}"
    )
    with pytest.raises(StorageError, match=says):
        load_whole(catalog)
    with pytest.raises(StorageError, match=says):
        check_files(catalog, catalog.tensors, open_storage(directory))
