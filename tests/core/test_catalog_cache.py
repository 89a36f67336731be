"""Catalogs kept on disk: the same as those that are read anew, never damaged ones, never another user's."""

from __future__ import annotations

import dataclasses
import os
import pickle
import resource
import shutil
import signal
import stat
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
from shardferry.checkpoint import catalog_cache, catalog_file
from shardferry.checkpoint.catalog import Catalog
from shardferry.checkpoint.catalog_cache import CatalogCache
from shardferry.checkpoint.catalog_file import decode_catalog, encode_catalog
from shardferry.checkpoint.column_file import UnusableFile
from shardferry.checkpoint.open import read_catalog
from shardferry.storage.base import open_storage
from tests.support.alone import save_alone
from tests.support.damage import edit_metadata
from tests.support.loads import bits, load_whole
from tests.support.ranks import RankPool

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
def cache(tmp_path: Path) -> CatalogCache:
    return CatalogCache(tmp_path / "cache", min_metadata_bytes=0)


def opened(path: Path, cache: CatalogCache | None) -> Catalog:
    storage = open_storage(path)
    try:
        return read_catalog(storage, cache=cache)
    finally:
        storage.close()


def plain(catalog: Catalog) -> dict[str, Any]:
    """To be compared; but for the digest, which says that the catalog is kept."""
    values = {field.name: getattr(catalog, field.name) for field in dataclasses.fields(catalog)}
    del values["metadata_digest"]
    return {
        name: (value.dtype, value.tolist()) if isinstance(value, np.ndarray) else value
        for name, value in values.items()
    }


def cached_files(cache: CatalogCache) -> list[Path]:
    return sorted(cache.directory.iterdir())


@pytest.fixture
def unpickled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The metadata files that were unpickled."""
    seen: list[str] = []
    parse = shardferry.checkpoint.metadata_files.parse_metadata

    def noting(data: memoryview, *, source: str) -> Any:
        seen.append(source)
        return parse(data, source=source)

    monkeypatch.setattr("shardferry.checkpoint.metadata_files.parse_metadata", noting)
    return seen


def test_the_second_opening_unpickles_nothing(saved: Path, cache: CatalogCache, unpickled: list[str]) -> None:
    anew, first, second = opened(saved, None), opened(saved, cache), opened(saved, cache)
    assert unpickled == [f"{saved}/.metadata"] * 2
    assert plain(anew) == plain(first) == plain(second)
    assert list(second.tensors) == list(anew.tensors)
    assert {key: bits(value) for key, value in load_whole(second).items()} == {
        key: bits(value) for key, value in load_whole(anew).items()
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
    tmp_path: Path, cache: CatalogCache, save: Callable[[Path], None], unpickled: list[str]
) -> None:
    save(tmp_path / "ckpt")
    first, second = opened(tmp_path / "ckpt", cache), opened(tmp_path / "ckpt", cache)
    assert plain(second) == plain(first) == plain(opened(tmp_path / "ckpt", None))
    assert len(unpickled) == 2


def test_metadata_of_each_rank(tmp_path: Path, saved: Path, cache: CatalogCache, unpickled: list[str]) -> None:
    metadata = (saved / ".metadata").read_bytes()
    (saved / ".metadata").unlink()
    for rank in range(3):
        (saved / f"__{rank}.metadata").write_bytes(metadata)
    assert plain(opened(saved, cache)) == plain(opened(saved, cache))
    assert len(unpickled) == 3
    (saved / "__2.metadata").unlink()  # two of the same parts are another checkpoint
    opened(saved, cache)
    assert len(unpickled) == 5


def test_other_metadata_is_another_catalog(saved: Path, cache: CatalogCache, unpickled: list[str]) -> None:
    opened(saved, cache)
    edit_metadata(saved, lambda metadata: metadata.state_dict_metadata.pop("state.half"))
    assert "state.half" not in opened(saved, cache).tensors
    assert len(unpickled) == len(cached_files(cache)) == 2


def test_a_kept_catalog_has_the_digest_of_its_metadata(saved: Path, cache: CatalogCache) -> None:
    """By which whatever is made of it can be kept, too: the same for a checkpoint that was moved, and across processes."""
    first, second = opened(saved, cache), opened(saved, cache)
    elsewhere = Path(shutil.copytree(saved, saved.parent / "moved"))
    assert first.metadata_digest
    assert second.metadata_digest == opened(elsewhere, cache).metadata_digest == first.metadata_digest
    assert pickle.loads(pickle.dumps(second)).metadata_digest == first.metadata_digest
    edit_metadata(saved, lambda metadata: metadata.state_dict_metadata.pop("state.half"))
    assert opened(saved, cache).metadata_digest not in (b"", first.metadata_digest)
    assert opened(saved, None).metadata_digest == b""
    assert opened(saved, dataclasses.replace(cache, min_metadata_bytes=2**30)).metadata_digest == b""


def test_files_are_asked_for_anew(saved: Path, cache: CatalogCache, unpickled: list[str]) -> None:
    """Lengths, versions and the place of a checkpoint are not the cache's; what is read is what is there now."""
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
        pytest.param(lambda data: flipped(bytearray(data), 3), id="magic"),
        pytest.param(lambda data: flipped(bytearray(data), 8), id="version"),
        pytest.param(lambda data: flipped(bytearray(data), 16), id="length"),
        pytest.param(lambda data: flipped(bytearray(data), 40), id="digest"),
        pytest.param(lambda data: flipped(bytearray(data), 80), id="header"),
        pytest.param(lambda data: flipped(bytearray(data), len(data) - 65), id="column"),
        pytest.param(lambda data: flipped(bytearray(data), len(data) - 1), id="padding"),
        pytest.param(lambda data: pickle.dumps({"a": 1}), id="a pickle"),
    ],
)
def test_a_damaged_file_is_written_anew(
    saved: Path, cache: CatalogCache, unpickled: list[str], spoil: Callable[[bytes], bytes]
) -> None:
    wanted = plain(opened(saved, cache))
    (file,) = cached_files(cache)
    whole = file.read_bytes()
    file.write_bytes(spoil(whole))
    assert plain(opened(saved, cache)) == wanted
    assert len(unpickled) == 2
    assert file.read_bytes() == whole
    opened(saved, cache)
    assert len(unpickled) == 2


def test_every_flipped_byte_is_noticed(saved: Path) -> None:
    data = bytearray(b"".join(encode_catalog(opened(saved, None))))
    for at in range(0, len(data), 7):
        data[at] ^= 0x10
        with pytest.raises(UnusableFile):
            decode_catalog(memoryview(bytes(data)), location="x")
        data[at] ^= 0x10
    decode_catalog(memoryview(bytes(data)), location="x")


def test_a_file_that_leads_out_of_the_checkpoint(saved: Path) -> None:
    """Whole, by its digest, and yet nothing that was ever made of metadata."""
    forged = dataclasses.replace(opened(saved, None), files=("../outside.distcp",))
    data = memoryview(b"".join(encode_catalog(forged)))
    with pytest.raises(UnusableFile, match="it names a file outside of the checkpoint"):
        decode_catalog(data, location="x")


def test_another_version(
    saved: Path, cache: CatalogCache, monkeypatch: pytest.MonkeyPatch, unpickled: list[str]
) -> None:
    opened(saved, cache)
    (before,) = cached_files(cache)
    newer = dataclasses.replace(catalog_file.CATALOG_FILE, version=catalog_file.CATALOG_FILE.version + 1)
    for module in (catalog_file, catalog_cache):
        monkeypatch.setattr(module, "CATALOG_FILE", newer)
    opened(saved, cache)
    assert len(unpickled) == len(cached_files(cache)) == 2
    (after,) = set(cached_files(cache)) - {before}
    shutil.copy(before, after)  # of the older version, under the newer one's name
    opened(saved, cache)
    assert len(unpickled) == 3


def test_files_are_the_users_alone(saved: Path, cache: CatalogCache) -> None:
    opened(saved, cache)
    (file,) = cached_files(cache)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (cache.directory, file)] == [0o700, 0o600]


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777], ids=oct)
def test_a_directory_that_others_may_write_to(
    saved: Path, cache: CatalogCache, mode: int, unpickled: list[str]
) -> None:
    opened(saved, cache)
    cache.directory.chmod(mode)
    (file,) = cached_files(cache)
    before = file.stat().st_mtime_ns
    opened(saved, cache)
    assert len(unpickled) == 2
    assert file.stat().st_mtime_ns == before


def test_a_directory_or_a_file_of_another_user(
    saved: Path, cache: CatalogCache, monkeypatch: pytest.MonkeyPatch, unpickled: list[str]
) -> None:
    opened(saved, cache)
    another = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: another)
    opened(saved, cache)
    opened(saved, cache)
    assert len(unpickled) == 3


def test_symbolic_links(saved: Path, cache: CatalogCache, tmp_path: Path, unpickled: list[str]) -> None:
    """One in the place of a catalog is neither read nor written through; a directory may be one, where it is the user's."""
    wanted = plain(opened(saved, cache))
    (file,) = cached_files(cache)
    victim = tmp_path / "victim"
    file.rename(victim)
    file.symlink_to(victim)
    before = victim.read_bytes()
    assert plain(opened(saved, cache)) == wanted
    assert len(unpickled) == 2
    assert not file.is_symlink()
    assert victim.read_bytes() == before
    (tmp_path / "link").symlink_to(cache.directory)
    opened(saved, dataclasses.replace(cache, directory=tmp_path / "link"))
    assert len(unpickled) == 2


def test_what_is_no_file(saved: Path, cache: CatalogCache) -> None:
    """A pipe would be waited for, a directory can't be read."""
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
def test_where_nothing_can_be_written(saved: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    cache = CatalogCache(tmp_path / place, min_metadata_bytes=0)
    assert plain(opened(saved, cache)) == plain(opened(saved, None))


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


def test_a_full_disk_leaves_no_part_of_a_file(saved: Path, cache: CatalogCache) -> None:
    with full_disk():
        catalog = opened(saved, cache)
    assert plain(catalog) == plain(opened(saved, None))
    assert cached_files(cache) == []


def test_a_directory_of_which_the_mode_forbids_writing(saved: Path, cache: CatalogCache, unpickled: list[str]) -> None:
    """What is there is read all the same."""
    opened(saved, cache)
    cache.directory.chmod(0o500)
    opened(saved, cache)
    assert len(unpickled) == 1
    cache.directory.chmod(0o700)


def open_often(path: Path, cache: CatalogCache) -> int:
    """Number of openings that gave the catalog."""
    wanted, right = plain(opened(path, None)), 0
    for _ in range(30):
        right += plain(opened(path, cache)) == wanted
        for file in cached_files(cache):
            if not file.name.endswith(".unfinished"):
                file.unlink(missing_ok=True)
    return right


def test_processes_that_write_at_once(ranks: RankPool, saved: Path, cache: CatalogCache) -> None:
    """Each makes and removes the same file over and over: whoever finds one finds a whole one."""
    cache.directory.mkdir(mode=0o700)
    assert ranks.run(3, open_often, saved, cache) == [30, 30, 30]
    assert cached_files(cache) == []


def test_the_oldest_go_first(saved: Path, cache: CatalogCache, unpickled: list[str]) -> None:
    def change(number: int) -> None:
        edit_metadata(saved, lambda metadata: metadata.planner_data.update({"number": ("n", number)}))

    change(0)
    opened(saved, cache)
    (first,) = cached_files(cache)
    small = dataclasses.replace(cache, max_bytes=2 * first.stat().st_size + 100)
    for number in (1, 2):
        for file in cached_files(cache):
            os.utime(file, ns=(0, file.stat().st_mtime_ns - 10**9))
        if number == 2:
            change(0)
            opened(saved, small)  # used again: younger than 1 now
        change(number)
        opened(saved, small)
    assert len(cached_files(small)) == 2
    assert first in cached_files(small)
    assert len(unpickled) == 3
    tiny = dataclasses.replace(cache, max_bytes=100)
    change(3)
    opened(saved, tiny)
    assert len(cached_files(cache)) == 2  # what is larger than the whole cache is not kept, and nothing goes for it


def test_what_a_killed_writer_left_is_removed(saved: Path, cache: CatalogCache) -> None:
    cache.directory.mkdir(mode=0o700)
    old, new, other = (cache.directory / name for name in ("a.unfinished", "b.unfinished", "notes.txt"))
    for path in (old, new, other):
        path.touch()
    os.utime(old, (0, 0))
    os.utime(other, (0, 0))
    opened(saved, cache)
    assert {path.name for path in cached_files(cache)} >= {"b.unfinished", "notes.txt"}
    assert not old.exists()


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert CatalogCache.of(True) == CatalogCache(tmp_path / "shardferry")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the specification
    monkeypatch.setenv("HOME", str(tmp_path))
    assert CatalogCache.of(True) == CatalogCache(tmp_path / ".cache" / "shardferry")
    assert CatalogCache.of("~/mine") == CatalogCache(tmp_path / "mine")
    assert CatalogCache.of(False) is None


def test_small_metadata_is_not_cached(saved: Path, tmp_path: Path) -> None:
    shardferry.open_checkpoint(saved, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
