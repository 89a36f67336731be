"""Data files of a later save than the metadata that describes them: told apart from saves and copies by the times of files."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import shardferry
from shardferry.checkpoint.open import open_checkpoint
from shardferry.checkpoint.stale import stale_metadata
from shardferry.errors import PlanError, SpecError
from tests.support.ranks import RankPool
from tests.support.small_net import Net, adamw, check, fill, save

SLOW = 100_000_000_000  # bytes: a copy of such a file takes hours


@pytest.mark.parametrize(
    ("metadata", "data", "largest", "stale"),
    [
        pytest.param(100.0, [98.0, 99.5, 99.9], 0, "", id="a save"),
        pytest.param(100.0, [97.0, 100.4, 99.0], 0, "", id="a save, clocks differ"),
        pytest.param(100.0, [40.0, 101.5, 99.0], 0, "", id="a long save, clocks differ more"),
        pytest.param(100.0, [100.0, 100.0, 100.0], 0, "", id="a copy in one second"),
        pytest.param(100.0, [101.0, 101.0, 100.0], 0, "", id="a copy over the end of a second"),
        pytest.param(100.0, [160.0, 220.0, 280.0, 340.0], 0, "", id="a slow copy, metadata first"),
        pytest.param(100.0, [40.0, 160.0, 220.0, -20.0], 0, "", id="a slow copy, metadata in the middle"),
        pytest.param(100.0, [900.0, 901.0, 905.0], SLOW, "", id="a copy of large files at once"),
        pytest.param(100.0, [160.0], 10**9, "", id="a copy of one large file"),
        pytest.param(100.0, [], 0, "", id="no times known"),
        pytest.param(100.0, [700.0, 701.0, 703.0], 0, "abc", id="a killed save, all written"),
        pytest.param(100.0, [99.0, 700.0, 99.5, 701.0], 0, "bd", id="a killed save, two of four written"),
        pytest.param(100.0, [99.0, 100.3, 700.0], 0, "c", id="a killed save, clocks differ"),
        pytest.param(100.0, [40.0, 700.0], 0, "b", id="a killed save over a long one"),
        pytest.param(100.0, [103.0], 0, "a", id="a killed save of one rank"),
        pytest.param(100.0, [4000.0], 10**9, "a", id="a killed save of a large file"),
    ],
)
def test_the_rule(metadata: float, data: list[float], largest: int, stale: str) -> None:
    found = stale_metadata(metadata, dict(zip("abcdef", data, strict=False)), largest_file_bytes=largest)
    assert "".join(() if found is None else found.files) == stale


def test_gap_and_length_of_the_save() -> None:
    found = stale_metadata(100.0, {"a": 97.0, "b": 150.0, "c": 160.0})
    assert found is not None
    assert (found.gap_s, found.save_s) == (50.0, 3.0)


def save_net(path: str) -> None:
    save(Path(path), *fill(model := Net(), adamw(model)))


@pytest.fixture
def checkpoint(ranks: RankPool, tmp_path: Path) -> Path:
    """Of four ranks, each of which has a file."""
    ranks.run(4, save_net, str(tmp_path / "ckpt"))
    return tmp_path / "ckpt"


def write_again(path: Path, num_files: int) -> list[str]:
    """As a later save that was killed: some data files, an hour after the metadata."""
    files = sorted(path.glob("*.distcp"))[:num_files]
    time = (path / ".metadata").stat().st_mtime + 3600
    for file in files:
        os.utime(file, (time, time))
    return [file.name for file in files]


@pytest.mark.parametrize("num_files", [4, 2])
def test_a_load_warns_or_refuses(checkpoint: Path, num_files: int, caplog: pytest.LogCaptureFixture) -> None:
    files = write_again(checkpoint, num_files)
    model = Net()
    optimizer = adamw(model)
    for refuse in (
        lambda: shardferry.load_optimizer_state(model, optimizer, str(checkpoint), stale="error"),
        lambda: shardferry.load_model_state(model, str(checkpoint), stale="error"),
    ):
        with pytest.raises(PlanError, match=rf"{files[0]}.* younger than .metadata by 3600.\d s"):
            refuse()
    assert not optimizer.state
    with pytest.raises(SpecError, match="stale: 'never' is not one of warn, error"):
        shardferry.load_optimizer_state(model, optimizer, str(checkpoint), stale="never")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        report = shardferry.load_optimizer_state(model, optimizer, str(checkpoint))
    (warning,) = report.warnings
    assert f"{num_files} of 4 data files" in warning
    assert warning in caplog.messages
    check(model, optimizer)


def test_saves_and_copies_do_not_warn(checkpoint: Path, tmp_path: Path) -> None:
    assert open_checkpoint(checkpoint).stale == ""
    subprocess.run(["cp", "-r", checkpoint, tmp_path / "copy"], check=True)
    assert open_checkpoint(tmp_path / "copy").stale == ""
    for first in (".metadata", "__0_0.distcp"):
        target = tmp_path / f"{first} first"
        target.mkdir()
        for file in sorted(checkpoint.iterdir(), key=lambda file: file.name != first):
            copy = Path(shutil.copyfile(file, target / file.name))
            os.utime(copy, (time := int(copy.stat().st_mtime), time))
        assert open_checkpoint(target).stale == ""


def test_times_of_other_storages(checkpoint: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.put(str(checkpoint), "/stale-ckpt", recursive=True)
    try:
        assert open_checkpoint("memory://stale-ckpt").stale == ""
        for file in memory.glob("/stale-ckpt/*.distcp"):
            memory.store[file].created = memory.store[file].created.replace(year=2100)
        assert "4 of 4 data files" in open_checkpoint("memory://stale-ckpt").stale
    finally:
        memory.rm("/stale-ckpt", recursive=True)
