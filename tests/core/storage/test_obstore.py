"""Whole checkpoints through obstore from real servers, and which URL is opened how."""

from __future__ import annotations

import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch

from shardferry.checkpoint.open import open_checkpoint
from shardferry.errors import CheckpointNotFound, SpecError, StorageError
from shardferry.region import Region
from shardferry.storage.obstore import StorePlace, place_of, split_options, taken_place
from shardferry.storage.open import open_storage
from tests.support.alone import save_alone
from tests.support.loads import load_boxes, load_whole
from tests.support.oracle import full_tensor
from tests.support.range_server import served
from tests.support.s3_server import BUCKET, S3Server

SHAPES = {"matrix": (96, 64), "vector": (1000,), "scalar": ()}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    state = {"optim": {fqn: full_tensor(fqn, "exp_avg", shape) for fqn, shape in SHAPES.items()}, "epoch": 3}
    save_alone(state, tmp_path / "ckpt")
    return tmp_path / "ckpt"


def files_of(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_a_checkpoint_in_s3(directory: Path, s3: S3Server) -> None:
    prefix = f"{uuid.uuid4()}/step-1"
    s3.put(prefix, files_of(directory))
    catalog = open_checkpoint(f"s3://{BUCKET}/{prefix}", storage_options=s3.options)
    assert set(catalog.file_versions) == set(catalog.files)
    s3.asked()
    found, counters = load_boxes(catalog, [("optim.matrix", Region((48, 0), (24, 64)))])
    assert torch.equal(found[0], full_tensor("matrix", "exp_avg", SHAPES["matrix"])[48:72])
    ranges = [asked for asked in s3.asked() if asked.method == "GET"]
    assert {asked.key for asked in ranges} == {f"{prefix}/{file}" for file in catalog.files}
    assert len(ranges) == counters.num_requests == 1  # the rows, and what is before them
    assert sum(asked.nbytes for asked in ranges) == counters.bytes_requested == 72 * 64 * 4 + 704


@pytest.mark.parametrize("tells_versions", [True, False])
def test_a_file_that_grows_between_two_reads(directory: Path, tells_versions: bool) -> None:
    """No size was asked for: the first answer says what the others are held against."""
    file = next(directory.glob("*.distcp"))
    with served(directory) as server:
        server.tells_versions = tells_versions
        storage = open_storage(server.url, {"client": "obstore"})
        storage.read_into(file.name, 0, memoryview(bytearray(10)))
        before = storage.size(file.name)
        assert [asked.method for asked in server.log] == ["GET"]
        file.write_bytes(file.read_bytes() + b"more")
        changed = "another, it was" if tells_versions else f"{before + 4} bytes, it was {before} bytes"
        with pytest.raises(StorageError, match=f"its version is {changed}.* written again since"):
            storage.read_into(file.name, 20, memoryview(bytearray(10)))


def test_an_object_that_is_put_again(directory: Path, s3: S3Server) -> None:
    prefix = f"{uuid.uuid4()}/step-1"
    s3.put(prefix, files_of(directory))
    catalog = open_checkpoint(f"s3://{BUCKET}/{prefix}", storage_options=s3.options)
    [name] = catalog.files
    s3.put(prefix, {name: bytes(len(files_of(directory)[name]))})
    with pytest.raises(StorageError, match=rf"{name}: its version is another, .*it was written again since"):
        load_whole(catalog)


def test_a_bucket_that_is_not_there(s3: S3Server) -> None:
    with pytest.raises(CheckpointNotFound, match=r"s3://nowhere/ckpt: no such bucket"):
        open_checkpoint("s3://nowhere/ckpt", storage_options=s3.options)


def test_a_checkpoint_on_a_web_server(directory: Path) -> None:
    with served(directory) as server:
        catalog = open_checkpoint(server.url)
        found = load_whole(catalog)
    for fqn, shape in SHAPES.items():
        assert torch.equal(found[f"optim.{fqn}"], full_tensor(fqn, "exp_avg", shape)), fqn
    assert not {asked.name for asked in server.log} - set(files_of(directory))


def test_metadata_of_each_rank_is_not_found_on_a_web_server(directory: Path) -> None:
    (directory / ".metadata").rename(directory / "__0.metadata")
    with served(directory) as server:
        with pytest.raises(CheckpointNotFound, match=r"no \.metadata file.* each rank wrote .*\"client\": \"fsspec\""):
            open_checkpoint(server.url)
        assert "optim.matrix" in open_checkpoint(server.url, storage_options={"client": "fsspec"}).tensors


def test_what_an_object_store_is_like() -> None:
    traits = open_storage("s3://bucket/ckpt", {"region": "us-east-1", "skip_signature": True}).traits
    assert (traits.is_local, traits.has_listing) == (False, True)
    assert 8 << 20 <= traits.max_request_bytes <= 64 << 20


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("s3://bucket/run/step 1/", StorePlace("s3", "bucket", "run/step 1")),
        ("s3a://bucket", StorePlace("s3", "bucket")),
        ("gs://bucket/a%20b", StorePlace("gcs", "bucket", "a%20b")),
        ("gcs://bucket/a", StorePlace("gcs", "bucket", "a")),
        ("az://container/a/b", StorePlace("azure", "container", "a/b")),
        ("abfs://container/a", StorePlace("azure", "container", "a")),
        ("abfss://container@account.dfs.core.windows.net/a", StorePlace("azure", "container", "a", "account")),
        ("https://host/a%20b/", StorePlace("http", "https://host/a%20b")),
        ("memory://a/b", None),
        ("hf://datasets/a", None),
        ("warp://a", None),
    ],
)
def test_places(url: str, place: StorePlace | None) -> None:
    assert place_of(url) == place
    assert taken_place(url, None) == place
    assert taken_place(url, "fsspec") is None


S3, WEB = StorePlace("s3", "bucket"), StorePlace("http", "http://host")


@pytest.mark.parametrize(
    ("place", "given", "config", "client_options"),
    [
        (S3, {"region": "r", "timeout": "5s"}, {"region": "r"}, {"timeout": "5s"}),
        (S3, {"endpoint": "http://a:1"}, {"endpoint": "http://a:1"}, {"allow_http": True}),
        (S3, {"endpoint": "http://a:1", "allow_http": False}, {"endpoint": "http://a:1"}, {"allow_http": False}),
        (S3, {"config": {"region": "r"}, "client_options": {"user_agent": "u"}}, {"region": "r"}, {"user_agent": "u"}),
        (
            S3,
            {"key": "k", "secret": "s", "client_kwargs": {"endpoint_url": "https://a"}},
            {"access_key_id": "k", "secret_access_key": "s", "endpoint": "https://a"},
            {},
        ),
        (StorePlace("azure", "c", "", "acc"), {"account_key": "k"}, {"account_key": "k", "account_name": "acc"}, {}),
        (WEB, {}, {}, {"allow_http": True}),
    ],
)
def test_options(place: StorePlace, given: dict[str, Any], config: Any, client_options: Any) -> None:
    assert split_options(place, given) == (config, client_options)


@pytest.mark.parametrize(
    ("url", "options", "says"),
    [
        ("s3://bucket/a", {"warp": 9}, r"s3://bucket/a: can't be opened with these storage_options: .*'warp'"),
        ("s3://bucket/a", {"timeout": "soon"}, r"can't be opened with these storage_options"),
        ("s3://bucket/a", {"retry_config": {}}, r"retry_config is ours to set; .*read\.max_attempts"),
        ("s3://bucket/a", {"config": "region"}, r"config is a str, not a mapping"),
        ("https://host/a", {"region": "r"}, r"a web server has no option 'region'"),
        ("https://host/a", {"client": "curl"}, r"client is 'curl'; it is obstore or fsspec"),
        ("memory://a", {"client": "obstore"}, r"memory://a: obstore has no such storage"),
    ],
)
def test_options_that_nobody_knows(url: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        open_storage(url, options)


def test_without_obstore(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)  # as if it were not installed
    with served(directory) as server:
        assert "optim.matrix" in open_checkpoint(server.url).tensors  # through fsspec, by the server's index page
        with pytest.raises(CheckpointNotFound, match=r"not installed: pip install 'shardferry\[object-stores\]'"):
            open_storage(server.url, {"client": "obstore"})
