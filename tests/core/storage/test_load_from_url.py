"""A load from a URL: the same call, options for the store beside it."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import fsspec
import pytest

import shardferry
from shardferry.checkpoint import open as checkpoint
from shardferry.checkpoint.open import storage_of
from shardferry.errors import CheckpointNotFound, StorageError
from shardferry.schemas import StageConfig
from shardferry.storage.base import RangeReader
from shardferry.storage.open import open_storage
from shardferry.storage.retry import RetryingReader
from tests.support.range_server import Fault, served
from tests.support.s3_server import BUCKET, S3Server
from tests.support.small_net import Net, adamw, check, fill, save


def test_load_from_a_url(tmp_path: Path) -> None:
    model = Net()
    save(tmp_path / "ckpt", *fill(model, adamw(model)))
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "ckpt"), "/url-test/ckpt", recursive=True)
    try:
        other = Net()
        optimizer = adamw(other)
        shardferry.load_optimizer_state(other, optimizer, "memory://url-test/ckpt", model_key="model")
        check(other, optimizer)
    finally:
        memory.rm("/url-test", recursive=True)


def test_options_go_with_the_catalog(tmp_path: Path) -> None:
    """``dir://`` reads another filesystem's directory, which only its options name."""
    model = Net()
    save(tmp_path / "ckpt", *fill(model, adamw(model)))
    options = {"target_protocol": "file", "path": str(tmp_path)}
    catalog = shardferry.open_checkpoint("dir://ckpt", storage_options=options)
    with_options = storage_of(catalog)
    assert ".metadata" in with_options.listing()
    with_options.close()
    other = Net()
    optimizer = adamw(other)
    shardferry.load_optimizer_state(other, optimizer, "dir://ckpt", storage_options=options)
    check(other, optimizer)
    spec = StageConfig.model_validate({"checkpoint": {"location": "dir://ckpt", "storage_options": options}})
    assert spec.checkpoint.storage_options == options


class WrittenAfterwards(RetryingReader):
    """A storage whose files are written again by another process just after they were listed."""

    def __init__(self, storage: RangeReader, write: Callable[[], object]) -> None:
        super().__init__(storage)
        self._write = write

    def listing(self) -> dict[str, int | None]:
        listing = super().listing()
        self._write()
        return listing


@pytest.mark.parametrize("same_size", [False, True])
def test_metadata_that_is_written_again_meanwhile(tmp_path: Path, s3: S3Server, same_size: bool) -> None:
    """The listing is of before, the metadata of after: nothing is made of the two."""
    model, prefix = Net(), str(uuid.uuid4())
    save(tmp_path / "ckpt", *fill(model, adamw(model)))
    after = {file.name: file.read_bytes() for file in (tmp_path / "ckpt").iterdir()}
    before = after | {".metadata": after[".metadata"][:: -1 if same_size else -2]}
    s3.put(prefix, before)
    url = f"s3://{BUCKET}/{prefix}"
    what = r"\.metadata: its version is .*written again since\. Open the checkpoint"
    storage = WrittenAfterwards(open_storage(url, s3.options), lambda: s3.put(prefix, after))
    with closing(storage), pytest.raises(StorageError, match=what):
        checkpoint.read_catalog(storage)
    again = shardferry.open_checkpoint(url, storage_options=s3.options)
    assert again.tensors == shardferry.open_checkpoint(str(tmp_path / "ckpt")).tensors


def test_options_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound):
        shardferry.open_checkpoint("memory://nowhere/ckpt")


def test_attempts_are_those_of_the_call(tmp_path: Path) -> None:
    model = Net()
    save(tmp_path / "ckpt", *fill(model, adamw(model)))
    other = Net()
    optimizer = adamw(other)
    with served(tmp_path / "ckpt", faults=[Fault.BUSY]) as server:
        with pytest.raises(StorageError, match=r"tried 1 time in .* \(read\.max_attempts is 1\)"):
            shardferry.load_optimizer_state(other, optimizer, server.url, model_key="model", max_attempts=1)
        shardferry.load_optimizer_state(other, optimizer, server.url, model_key="model", max_attempts=1)
    check(other, optimizer)
