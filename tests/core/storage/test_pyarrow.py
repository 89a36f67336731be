"""Directories of pyarrow filesystems, as a ``ray.train.Checkpoint`` is one: local ones, S3 from a real server, fsspec's."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import pytest
import torch

import shardferry
from shardferry.errors import CheckpointNotFound, SpecError, StorageError
from shardferry.region import Region
from shardferry.storage.fsspec import open_location as open_with_fsspec
from shardferry.storage.obstore import StorePlace, split_options
from shardferry.storage.open import open_storage
from shardferry.storage.retry import RetryPolicy
from tests.support.alone import save_alone
from tests.support.commands import REPOSITORY
from tests.support.loads import bits, load_boxes, load_whole
from tests.support.oracle import full_tensor
from tests.support.s3_server import BUCKET, S3Server

fs = pytest.importorskip("pyarrow.fs")

SHAPES = {"matrix": (96, 64), "vector": (1000,), "scalar": ()}


class Placed(NamedTuple):
    """What Ray Train's class is to a load: the two attributes."""

    path: str
    filesystem: Any


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    state = {"optim": {fqn: full_tensor(fqn, "exp_avg", shape) for fqn, shape in SHAPES.items()}, "epoch": 3}
    save_alone(state, tmp_path / "ckpt")
    return tmp_path / "ckpt"


@pytest.fixture
def on_s3(directory: Path, s3: S3Server) -> Placed:
    """The checkpoint in a bucket, below a directory whose name has a space."""
    prefix = f"{uuid.uuid4()}/step 1"
    s3.put(prefix, {file.name: file.read_bytes() for file in directory.iterdir()})
    return Placed(f"{BUCKET}/{prefix}", s3.filesystem())


def check_content(catalog: shardferry.Catalog) -> None:
    found = load_whole(catalog)
    for fqn, shape in SHAPES.items():
        assert torch.equal(found[f"optim.{fqn}"], full_tensor(fqn, "exp_avg", shape)), fqn


def test_a_checkpoint_of_ray_train(directory: Path) -> None:
    train = pytest.importorskip("ray.train", exc_type=ImportError)  # needs pandas
    catalog = shardferry.open_checkpoint(train.Checkpoint.from_directory(directory))
    assert (catalog.location, catalog.storage_options) == (str(directory), {})
    check_content(catalog)


def local_ones(directory: Path) -> dict[str, Placed]:
    local = fs.LocalFileSystem()
    parent, name = directory.parent, directory.name
    nested = fs.SubTreeFileSystem(parent.name, fs.SubTreeFileSystem(str(parent.parent), local))
    return {
        "local": Placed(str(directory), local),
        "subtree": Placed(name, fs.SubTreeFileSystem(str(parent), local)),
        "subtree with a slash": Placed(f"/{name}", fs.SubTreeFileSystem(f"{parent}/", local)),
        "subtree of a subtree": Placed(name, nested),
        "the root": Placed(str(directory), fs.SubTreeFileSystem("/", local)),
        "fsspec's": Placed(str(directory), fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem("file")))),
    }


@pytest.mark.parametrize("kind", local_ones(Path("/a/b/c")))
def test_a_local_filesystem_is_a_path(directory: Path, kind: str) -> None:
    """With the traits and the options of local files, in every process."""
    storage = open_storage(local_ones(directory)[kind], {"page_cache": "drop"})
    assert (storage.location, storage.traits.is_local) == (str(directory), True)
    assert storage.options == {"page_cache": "drop"}


def test_a_checkpoint_in_s3(on_s3: Placed, s3: S3Server) -> None:
    catalog = shardferry.open_checkpoint(on_s3)
    assert catalog.location == f"s3://{on_s3.path}"
    assert set(catalog.file_versions) == set(catalog.files)
    check_content(catalog)
    s3.asked()
    found, counters = load_boxes(catalog, [("optim.matrix", Region((48, 0), (24, 64)))])
    assert torch.equal(found[0], full_tensor("matrix", "exp_avg", SHAPES["matrix"])[48:72])
    ranges = [asked for asked in s3.asked() if asked.method == "GET"]
    assert len(ranges) == counters.num_requests == 1
    assert sum(asked.nbytes for asked in ranges) == counters.bytes_requested == 72 * 64 * 4 + 704


def test_below_a_subtree_of_s3(on_s3: Placed) -> None:
    bucket, _, rest = on_s3.path.partition("/")
    placed = Placed(rest, fs.SubTreeFileSystem(bucket, on_s3.filesystem))
    catalog = shardferry.open_checkpoint(placed)
    assert catalog.location == f"s3://{on_s3.path}"
    check_content(catalog)
    check_content(shardferry.open_checkpoint(rest, storage_options={"filesystem": placed.filesystem}))


IN_ANOTHER_PROCESS = """
import pickle, sys
from tests.support.loads import bits, load_whole
sys.stdout.buffer.write(bits(load_whole(pickle.load(sys.stdin.buffer))["optim.matrix"]))
"""


def test_the_catalog_crosses_processes(on_s3: Placed) -> None:
    catalog = shardferry.open_checkpoint(on_s3)
    assert "test" not in repr(catalog)
    check_content(pickle.loads(pickle.dumps(catalog)))
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS]
    done = subprocess.run(command, cwd=REPOSITORY, input=pickle.dumps(catalog), capture_output=True, timeout=250)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == bits(full_tensor("matrix", "exp_avg", SHAPES["matrix"]))


def test_live_objects_are_loaded(s3: S3Server, tmp_path: Path) -> None:
    """In the form of torch's tutorial, and of Ray's templates: ``{"app": AppState(model, optimizer)}``."""
    model = torch.nn.Linear(6, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    save_alone({"app": AppState(model, optimizer)}, tmp_path / "ckpt")
    prefix = str(uuid.uuid4())
    s3.put(prefix, {file.name: file.read_bytes() for file in (tmp_path / "ckpt").iterdir()})
    for location in (
        Placed(f"{BUCKET}/{prefix}", s3.filesystem()),
        Placed(str(tmp_path / "ckpt"), fs.LocalFileSystem()),
    ):
        other = torch.nn.Linear(6, 10)
        resumed = torch.optim.AdamW(other.parameters())
        shardferry.load_optimizer_state(other, resumed, location, optimizer_key="app.optim", model_key="app.model")
        assert torch.equal(other.weight, model.weight)
        for name, value in optimizer.state[model.weight].items():
            assert torch.equal(resumed.state[other.weight][name], value), name
        assert resumed.param_groups[0]["lr"] == 0.25
        again = torch.nn.Linear(6, 10)
        shardferry.load_model_state(again, location, model_key="app.model")
        assert torch.equal(again.bias, model.bias)


class AppState:
    """Stateful, as torch's tutorial on DCP has it."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optimizer}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise NotImplementedError


@pytest.fixture
def in_memory(directory: Path) -> Iterator[Placed]:
    memory, root = fsspec.filesystem("memory"), f"/{uuid.uuid4()}/ckpt"
    for file in directory.iterdir():
        memory.pipe_file(f"{root}/{file.name}", file.read_bytes())
    yield Placed(root, fs.PyFileSystem(fs.FSSpecHandler(memory)))
    memory.rm(root.rpartition("/")[0], recursive=True)


def test_one_of_fsspec_is_read_by_ranges(in_memory: Placed) -> None:
    catalog = shardferry.open_checkpoint(in_memory)
    assert catalog.location == f"memory://{in_memory.path}"
    check_content(catalog)


def test_what_is_not_there(on_s3: Placed) -> None:
    with pytest.raises(CheckpointNotFound, match=r"s3://bucket/nowhere: no such directory"):
        shardferry.open_checkpoint(Placed(f"{BUCKET}/nowhere", on_s3.filesystem))
    with pytest.raises(CheckpointNotFound, match=r"s3://no-bucket/ckpt: no such bucket"):
        shardferry.open_checkpoint(Placed("no-bucket/ckpt", on_s3.filesystem))
    with pytest.raises(CheckpointNotFound, match=r"/nowhere: no such directory"):
        shardferry.open_checkpoint(Placed("/nowhere", fs.LocalFileSystem()))


def test_a_file_that_goes_after_the_catalog_was_read(on_s3: Placed) -> None:
    catalog = shardferry.open_checkpoint(on_s3)
    on_s3.filesystem.delete_file(f"{on_s3.path}/{catalog.files[0]}")
    with pytest.raises(StorageError, match=r"distcp: the file is missing"):
        load_whole(catalog)


@pytest.mark.parametrize(
    ("location", "options", "says"),
    [
        (
            Placed("bucket/a", fs.S3FileSystem(anonymous=True, region="us-east-1")),
            {"region": "r"},
            r"ignores .* region;",
        ),
        (Placed("/a", "local"), {}, r"/a: its filesystem is a str, not one of pyarrow\.fs"),
        (5, {}, r"a int is neither a path, nor a URL, nor a ray\.train\.Checkpoint"),
    ],
)
def test_locations_that_cannot_be_opened(location: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        open_storage(location, options)


@pytest.fixture
def busy_server() -> Iterator[tuple[int, list[str]]]:
    """A server that tells everybody to slow down: its port, and what it was asked."""
    asked: list[str] = []

    class Busy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            body = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
            self.send_response(503)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Busy)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port, asked
    server.shutdown()
    thread.join()
    server.server_close()


def once(port: int) -> Any:
    """S3 on the loopback, without retries of its own."""
    return fs.S3FileSystem(
        endpoint_override=f"127.0.0.1:{port}",
        scheme="http",
        access_key="test",
        secret_key="test",
        region="us-east-1",
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1),
    )


def test_a_busy_server_is_asked_again(busy_server: tuple[int, list[str]]) -> None:
    port, asked = busy_server
    policy = RetryPolicy(max_attempts=3, first_wait_s=0.01)
    storage = open_storage(Placed("bucket/ckpt", once(port)), retry=policy)
    with pytest.raises(StorageError, match=r"can't be listed: .*; tried 3 times"):
        storage.listing()
    assert len(asked) == 3


def test_a_server_that_is_not_there_is_asked_again() -> None:
    storage = open_storage(Placed("bucket/ckpt", once(9)), retry=RetryPolicy(max_attempts=2, first_wait_s=0.01))
    with pytest.raises(StorageError, match=r"can't be listed: .*NETWORK_CONNECTION.*; tried 2 times"):
        storage.listing()


@pytest.mark.parametrize(
    ("given", "config"),
    [
        (
            {"endpoint_override": "127.0.0.1:9000", "scheme": "http", "access_key": "k", "secret_key": "s"},
            {"endpoint": "http://127.0.0.1:9000", "access_key_id": "k", "secret_access_key": "s"},
        ),
        ({"endpoint_override": "minio.example"}, {"endpoint": "https://minio.example"}),
        ({"endpoint_override": "http://a:1", "anonymous": True}, {"endpoint": "http://a:1", "skip_signature": True}),
    ],
)
def test_pyarrow_s_names_of_options_of_s3(given: dict[str, Any], config: dict[str, Any]) -> None:
    found, client_options = split_options(StorePlace("s3", "bucket"), given)
    assert found == config
    assert client_options == ({"allow_http": True} if config["endpoint"].startswith("http://") else {})


@pytest.mark.parametrize(("name", "of_s3fs"), [("endpoint_override", "endpoint_url"), ("access_key", "key")])
def test_s3fs_ignores_no_option_of_others(name: str, of_s3fs: str) -> None:
    with pytest.raises(SpecError, match=rf"s3fs has no option '{name}', its name there is {of_s3fs}; with obstore"):
        open_with_fsspec("s3://bucket/ckpt", {name: "x"})
