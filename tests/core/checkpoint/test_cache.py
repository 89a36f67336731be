"""Catalogs kept in a directory: equal to those built from the metadata, never damaged ones, never what another file says."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint._extension import ZStandard

import shardferry
from benchmarks.synthetic_save import SyntheticSave
from shardferry.checkpoint.cache import CatalogCache, decode_catalog, encode_catalog
from shardferry.checkpoint.catalog import Catalog
from tests.support.alone import save_alone
from tests.support.damage import edit_metadata
from tests.support.loads import bits, load_whole

TENSORS = {
    "matrix": torch.arange(12.0).view(3, 4),
    "half": torch.ones(5, dtype=torch.bfloat16),
    "none": torch.empty(0, 4),
}
STATE = {"state": TENSORS, "groups": [{"lr": 0.5, "betas": (0.25, 0.5)}], "number": torch.tensor(3.0)}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_alone(STATE, tmp_path / "ckpt")
    return tmp_path / "ckpt"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def opened(path: Path, cache: Path | None) -> Catalog:
    return shardferry.open_checkpoint(path, cache=cache)


def plain(catalog: Catalog) -> dict[str, Any]:
    """All fields, in a form that can be compared."""
    values = {field.name: getattr(catalog, field.name) for field in dataclasses.fields(catalog)}
    return {
        name: (value.dtype, value.tolist()) if isinstance(value, np.ndarray) else value
        for name, value in values.items()
    }


def cached_files(cache: Path) -> list[Path]:
    return sorted(cache.iterdir())


@pytest.fixture
def unpickled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The metadata files that were unpickled."""
    seen: list[str] = []
    parse = shardferry.checkpoint.open.parse_metadata

    def noting(data: memoryview, *, source: str) -> Any:
        seen.append(source)
        return parse(data, source=source)

    monkeypatch.setattr("shardferry.checkpoint.open.parse_metadata", noting)
    return seen


def test_the_second_opening_unpickles_nothing(saved: Path, cache: Path, unpickled: list[str]) -> None:
    built, first, second = opened(saved, None), opened(saved, cache), opened(saved, cache)
    assert unpickled == [f"{saved}/.metadata"] * 2
    assert plain(built) == plain(first) == plain(second)
    assert list(second.tensors) == list(built.tensors)
    assert {key: bits(value) for key, value in load_whole(second).items()} == {
        key: bits(value) for key, value in load_whole(built).items()
    }


def compressed(path: Path) -> None:
    save_alone(STATE, path, storage_writer=FileSystemWriter(path, _extensions=[ZStandard()]))


def nothing_but_chunks_without_a_file(path: Path) -> None:
    save_alone(STATE, path)
    edit_metadata(path, lambda metadata: metadata.storage_data.clear())


def with_strange_paths(path: Path) -> None:
    save_alone(STATE, path)

    def edit(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = "a//b/./ü \udc80.distcp"
        metadata.planner_data.update({"x": ("x", 1, "\ud800", "1"), "": ("",)})

    edit_metadata(path, edit)


def without_paths(path: Path) -> None:
    save_alone(STATE, path)
    edit_metadata(path, lambda metadata: setattr(metadata, "planner_data", None))


def with_a_problem_of_the_planner(path: Path) -> None:
    save_alone(STATE, path)
    edit_metadata(path, lambda metadata: setattr(metadata, "planner_data", [1]))


def empty(path: Path) -> None:
    save_alone({}, path)


@pytest.mark.parametrize(
    "save",
    [
        compressed,
        nothing_but_chunks_without_a_file,
        with_strange_paths,
        without_paths,
        with_a_problem_of_the_planner,
        empty,
    ],
)
def test_whatever_a_catalog_holds_comes_back(
    tmp_path: Path, cache: Path, save: Callable[[Path], None], unpickled: list[str]
) -> None:
    save(tmp_path / "ckpt")
    first, second = opened(tmp_path / "ckpt", cache), opened(tmp_path / "ckpt", cache)
    assert plain(second) == plain(first) == plain(opened(tmp_path / "ckpt", None))
    assert len(unpickled) == 2


def test_metadata_of_each_rank(tmp_path: Path, saved: Path, cache: Path, unpickled: list[str]) -> None:
    metadata = (saved / ".metadata").read_bytes()
    (saved / ".metadata").unlink()
    for rank in range(3):
        (saved / f"__{rank}.metadata").write_bytes(metadata)
    assert plain(opened(saved, cache)) == plain(opened(saved, cache))
    assert len(unpickled) == 3
    (saved / "__2.metadata").unlink()  # two of the same parts are another checkpoint
    opened(saved, cache)
    assert len(unpickled) == 5


def test_other_metadata_is_another_catalog(saved: Path, cache: Path, unpickled: list[str]) -> None:
    opened(saved, cache)
    edit_metadata(saved, lambda metadata: metadata.state_dict_metadata.pop("state.half"))
    assert "state.half" not in opened(saved, cache).tensors
    assert len(unpickled) == len(cached_files(cache)) == 2


def test_files_are_looked_up_at_each_opening(saved: Path, cache: Path, unpickled: list[str]) -> None:
    """Lengths, versions and the location of a checkpoint come from the storage, not from the cache."""
    before = opened(saved, cache)
    elsewhere = Path(shutil.copytree(saved, saved.parent / "moved"))
    with (elsewhere / before.files[0]).open("ab") as file:
        file.write(b"more")
    after = opened(elsewhere, cache)
    assert len(unpickled) == 1
    assert after.location == str(elsewhere)
    assert after.file_bytes == {name: size + 4 for name, size in before.file_bytes.items()}
    assert after.file_versions != before.file_versions
    (elsewhere / before.files[0]).unlink()
    assert opened(elsewhere, cache).file_bytes == {}


def flipped(data: bytearray, at: int) -> bytes:
    data[at] ^= 1
    return bytes(data)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data[:20], id="less than a head"),
        pytest.param(lambda data: data[:-1], id="cut"),
        pytest.param(lambda data: data + b"\0", id="longer"),
        pytest.param(lambda data: bytes(len(data)), id="zeros"),
        pytest.param(lambda data: flipped(bytearray(data), 7), id="another version"),
        pytest.param(lambda data: flipped(bytearray(data), 20), id="digest"),
        pytest.param(lambda data: flipped(bytearray(data), 40), id="length of the header"),
        pytest.param(lambda data: flipped(bytearray(data), 80), id="header"),
        pytest.param(lambda data: flipped(bytearray(data), len(data) - 65), id="column"),
        pytest.param(lambda data: flipped(bytearray(data), len(data) - 1), id="last byte"),
        pytest.param(lambda data: pickle.dumps({"a": 1}), id="a pickle"),
    ],
)
def test_a_damaged_or_foreign_file_is_ignored_and_written_again(
    saved: Path,
    cache: Path,
    unpickled: list[str],
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[bytes], bytes],
) -> None:
    wanted = plain(opened(saved, cache))
    (file,) = cached_files(cache)
    whole = file.read_bytes()
    file.write_bytes(spoil(whole))
    with caplog.at_level(logging.INFO, "shardferry.checkpoint.cache"):
        assert plain(opened(saved, cache)) == wanted
    assert [message.partition(": not used: ")[0] for message in caplog.messages] == [str(file)]
    assert len(unpickled) == 2
    assert file.read_bytes() == whole
    opened(saved, cache)
    assert len(unpickled) == 2


def test_every_flipped_byte_is_noticed(saved: Path) -> None:
    data = bytearray(b"".join(encode_catalog(opened(saved, None))))
    for at in range(0, len(data), 7):
        data[at] ^= 0x10
        with pytest.raises(ValueError, match=r"it is not a catalog of this version|its bytes are damaged"):
            decode_catalog(memoryview(bytes(data)), location="x")
        data[at] ^= 0x10
    decode_catalog(memoryview(bytes(data)), location="x")


def test_a_file_that_leads_out_of_the_checkpoint(saved: Path) -> None:
    """Whole, by its digest, and yet nothing that was ever made of metadata."""
    forged = dataclasses.replace(opened(saved, None), files=("../outside.distcp",))
    data = memoryview(b"".join(encode_catalog(forged)))
    with pytest.raises(ValueError, match="it names a file outside of the checkpoint"):
        decode_catalog(data, location="x")


def test_a_dtype_that_is_not_one(saved: Path) -> None:
    catalog = opened(saved, None)
    tensors = {key: dataclasses.replace(tensor, dtype="load") for key, tensor in catalog.tensors.items()}
    data = memoryview(b"".join(encode_catalog(dataclasses.replace(catalog, tensors=tensors))))
    with pytest.raises(ValueError, match="it names a dtype that this torch does not have"):
        decode_catalog(data, location="x")


def test_a_symbolic_link_is_replaced_not_written_through(
    saved: Path, cache: Path, tmp_path: Path, unpickled: list[str]
) -> None:
    opened(saved, cache)
    (file,) = cached_files(cache)
    (tmp_path / "victim").write_bytes(b"something else")
    file.unlink()
    file.symlink_to(tmp_path / "victim")
    opened(saved, cache)
    assert (tmp_path / "victim").read_bytes() == b"something else"
    opened(saved, cache)
    assert len(unpickled) == 2


def test_what_is_not_a_file(saved: Path, cache: Path) -> None:
    """Reading a pipe would wait for a writer; a directory can't be read."""
    wanted = plain(opened(saved, cache))
    (file,) = cached_files(cache)
    file.unlink()
    os.mkfifo(file)
    assert plain(opened(saved, cache)) == wanted
    file.unlink()
    file.mkdir()
    assert plain(opened(saved, cache)) == wanted
    assert cached_files(cache) == [file]  # a directory can't be replaced, and nothing unfinished is left


@pytest.mark.parametrize("place", ["file/below", "/proc/nowhere", "/proc/self/fd/nowhere", "\0"])
def test_where_nothing_can_be_written(
    saved: Path, tmp_path: Path, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    assert plain(opened(saved, tmp_path / place)) == plain(opened(saved, None))
    assert ": not kept: " in caplog.messages[0]


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 500 bytes."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_no_part_of_a_file(saved: Path, cache: Path) -> None:
    with full_disk():
        catalog = opened(saved, cache)
    assert plain(catalog) == plain(opened(saved, None))
    assert cached_files(cache) == []


def open_often(path: Path, cache: Path) -> int:
    """Number of openings that gave the catalog."""
    wanted, right = plain(opened(path, None)), 0
    for _ in range(30):
        right += plain(opened(path, cache)) == wanted
        for file in cached_files(cache):
            if file.suffix == ".catalog":
                file.unlink(missing_ok=True)
    return right


def test_processes_that_write_at_once(saved: Path, cache: Path) -> None:
    """Each writes and removes the same file over and over: a process that finds one finds a whole one."""
    cache.mkdir()
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert pool.starmap(open_often, [(saved, cache)] * 3, chunksize=1) == [30, 30, 30]
    assert cached_files(cache) == []


def test_a_directory_that_does_not_exist_is_made_for_its_user_alone(saved: Path, tmp_path: Path) -> None:
    opened(saved, tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700


def test_the_home_directory_is_the_users_to_name(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    shardferry.open_checkpoint(saved, cache="~/mine")
    (file,) = cached_files(tmp_path / "home" / "mine")
    assert CatalogCache(file.parent).get(bytes.fromhex(file.stem), location="x") is not None


def test_nothing_is_written_where_no_directory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However large the metadata; nor does anything digest it."""
    SyntheticSave(num_parameters=50, grid=(240,), num_files=64, states=("exp_avg", "exp_avg_sq")).write(
        tmp_path / "many"
    )
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setattr("hashlib.sha256", None)
    assert shardferry.open_checkpoint(tmp_path / "many").num_chunks == 24_000
    assert [path.name for path in tmp_path.iterdir()] == ["many"]
