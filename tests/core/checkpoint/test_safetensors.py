"""Safetensors checkpoints: what torch's two writers and the package itself leave, and headers that nobody should believe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed._shard.sharded_tensor import Shard as LocalShard
from torch.distributed._shard.sharded_tensor import init_from_local_shards
from torch.distributed.checkpoint import FileSystemWriter, HuggingFaceStorageWriter
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from shardferry.checkpoint.open import open_checkpoint, storage_of
from shardferry.checkpoint.optimizer_state import index_optimizer
from shardferry.checkpoint.safetensors import parse_header
from shardferry.config import LoadRequest
from shardferry.errors import CatalogError, PlanError, StorageError
from shardferry.layout.mesh import Mesh
from shardferry.layout.mesh import Shard as Cut
from shardferry.layout.spec import SpecLayout
from shardferry.plan.planner import plan_load
from shardferry.plan.predict import predict_reads
from shardferry.read.coalesce import JoinLimits
from shardferry.read.execute import Counters, read_object
from shardferry.read.verify import verify_checkpoint
from shardferry.region import Region
from shardferry.storage.local import LOCAL_FILES
from tests.support.alone import save_alone
from tests.support.loads import bits, load_boxes, load_whole
from tests.support.oracle import full_tensor, random_bits
from tests.support.ranks import RankPool

APART = JoinLimits.of(LOCAL_FILES, max_gap_bytes=0, max_request_bytes=None)  # nothing is joined

SHAPES = {"rows.weight": (10, 6), "columns.weight": (7, 9), "vector.bias": (5,)}
CUTS = {"rows.weight": 0, "columns.weight": 1, "vector.bias": 0}


def key_of(fqn: str) -> str:
    return f"optim.state.{fqn}.exp_avg"


def save_sharded(path: str, consolidate: bool) -> None:
    """On each rank: a flattened optimizer state dict of DTensors, as each of them is cut."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = {
        key_of(fqn): distribute_tensor(full_tensor(fqn, "exp_avg", shape), mesh, [Shard(CUTS[fqn])])
        for fqn, shape in SHAPES.items()
    }
    writer = HuggingFaceStorageWriter(path, save_distributed=True, enable_consolidation=consolidate)
    dcp.save(state, storage_writer=writer)


def check_oracle(path: Path) -> None:
    found = load_whole(open_checkpoint(path))
    assert set(found) == set(map(key_of, SHAPES))
    for fqn, shape in SHAPES.items():
        assert torch.equal(found[key_of(fqn)], full_tensor(fqn, "exp_avg", shape)), fqn


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_shards_of_ranks(ranks: RankPool, tmp_path: Path, num_ranks: int) -> None:
    path = tmp_path / "ckpt"
    ranks.run(num_ranks, save_sharded, str(path), False)
    assert len(list(path.glob("shard-*.safetensors"))) == num_ranks
    check_oracle(path)
    catalog = open_checkpoint(path)
    region = Region((3, 1), (6, 4))
    found, counters = load_boxes(catalog, [(key_of("rows.weight"), region)])
    assert torch.equal(found[0], full_tensor("rows.weight", "exp_avg", (10, 6))[3:9, 1:5])
    # No head has to be read: one request a chunk, for nothing but what is wanted.
    assert counters.bytes_requested == region.numel * 4
    assert verify_checkpoint(catalog, storage_of(catalog), concurrency=2) == []


def test_an_optimizer_is_found_by_its_keys(ranks: RankPool, tmp_path: Path) -> None:
    path = tmp_path / "ckpt"
    ranks.run(3, save_sharded, str(path), False)
    catalog = open_checkpoint(path)
    assert set(index_optimizer(catalog, "optim").state) == set(SHAPES)
    plan = plan_load(catalog, SpecLayout(Mesh((("dp", 2),)), default={"dp": Cut(0)}).rank(1), LoadRequest("optim"))
    assert plan.bytes_needed == (5 * 6 + 3 * 9 + 2) * 4 == predict_reads(plan, catalog, APART)[0]


def test_consolidated_output_and_its_shards(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, save_sharded, str(tmp_path / "ckpt"), True)
    check_oracle(tmp_path / "ckpt")
    check_oracle(tmp_path / "ckpt" / "sharded")


def test_a_missing_shard_is_a_hole(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(3, save_sharded, str(tmp_path / "ckpt"), False)
    (tmp_path / "ckpt" / "shard-00001-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(PlanError, match=r"wanted elements are in no saved chunk"):
        load_whole(open_checkpoint(tmp_path / "ckpt"))


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.complex64, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
]  # fmt: skip


def test_files_of_the_package_in_every_dtype(tmp_path: Path) -> None:
    tensors = {str(dtype).removeprefix("torch."): random_bits((5, 7), dtype, n) for n, dtype in enumerate(DTYPES)}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    catalog = open_checkpoint(tmp_path)
    found = load_whole(catalog)
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(found[name]) == bits(tensor), name
    assert catalog.torch_metadata_version == "safetensors"


def test_the_index_says_which_files_count(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.zeros(2)}, tmp_path / "model-2.safetensors")
    save_file({"a": torch.full((3,), 9.0)}, tmp_path / "consolidated.safetensors")
    with pytest.raises(
        CatalogError, match=r"a: consolidated\.safetensors and model-1\.safetensors both hold it from \(0,\)"
    ):
        open_checkpoint(tmp_path)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = load_whole(open_checkpoint(tmp_path))
    assert {key: tensor.tolist() for key, tensor in found.items()} == {"a": [1, 1, 1], "b": [0, 0]}
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(StorageError, match=r"model-2\.safetensors: the file is missing"):
        open_checkpoint(tmp_path)


def header_of(entries: dict[str, Any]) -> bytes:
    return json.dumps(entries).encode()


GOOD = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


@pytest.mark.parametrize(
    ("header", "says"),
    [
        pytest.param(header_of({"a": GOOD, "b": {**GOOD, "data_offsets": [20, 44]}}), "a ends at byte", id="overlap"),
        pytest.param(
            header_of({"a": {**GOOD, "data_offsets": [80, 104]}}), "a ends at byte .* it is cut", id="outside"
        ),
        pytest.param(header_of({"a": {**GOOD, "data_offsets": [24, 0]}}), "a: has -24 bytes", id="backwards"),
        pytest.param(header_of({"a": {**GOOD, "data_offsets": [-24, 0]}}), "not a list of sizes", id="negative"),
        pytest.param(header_of({"a": {**GOOD, "shape": [2, 4]}}), "a: has 24 bytes, but .* takes 32", id="shape"),
        pytest.param(header_of({"a": {**GOOD, "shape": [2.0, 3]}}), "not a list of sizes", id="float"),
        pytest.param(header_of({"a": {**GOOD, "dtype": "F4"}}), "a: its dtype 'F4' is not one that torch has", id="dtype"),
        pytest.param(header_of({"a": {"dtype": "F32"}}), "damaged .KeyError", id="incomplete"),
        pytest.param(header_of({"a": 3}), "damaged .TypeError", id="no entry"),
        pytest.param(b'{"a": {}, "a": {}}', "it has one name twice", id="twice"),
        pytest.param(b"[]", "damaged", id="no dict"),
        pytest.param(b"{" * 90_000, "damaged", id="deep"),
        pytest.param(b"\xff\xfe{}", "damaged", id="no text"),
        pytest.param(
            header_of({"__metadata__": {"DCP_SHARDING_INFO": '{"b": {"saved_offsets": [0, 0]}}'}, "a": GOOD}),
            "damaged .KeyError: 'a'",
            id="a shard without a place",
        ),
        pytest.param(
            header_of({"__metadata__": {"DCP_SHARDING_INFO": '{"a": {"saved_offsets": [0]}}'}, "a": GOOD}),
            r"a: has shape \(2, 3\), and would begin at \(0,\)",
            id="a place of another dimension",
        ),
    ],
)
def test_headers_that_nobody_should_believe(header: bytes, says: str) -> None:
    with pytest.raises(CatalogError, match=rf"^ckpt/x: .*{says}"):
        parse_header(header, path="x", file_bytes=8 + len(header) + 100, where="ckpt/x")


@pytest.mark.parametrize("data", [b"", b"\x05\0\0", (10**12).to_bytes(8, "little") + b"{}", b"PK\x03\x04" + bytes(60)])
def test_files_that_are_none(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(CatalogError, match=r"a\.safetensors: (has \d+ bytes, and its header|begins with a zip record)"):
        open_checkpoint(tmp_path)


def test_a_cut_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(30)}, tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(data[:-1])
    with pytest.raises(CatalogError, match=r"a ends at byte \d+, the file has \d+; it is cut"):
        open_checkpoint(tmp_path)


def test_a_header_longer_than_one_read(tmp_path: Path) -> None:
    tensors = {f"layers.{n}.some.long.name.of.a.weight": torch.tensor([float(n)]) for n in range(1_500)}
    save_file(tensors, tmp_path / "a.safetensors")
    found = load_whole(open_checkpoint(tmp_path))
    assert {key: tensor.item() for key, tensor in found.items()} == {key: t.item() for key, t in tensors.items()}


# FileSystemWriter with SerializationFormat.SAFETENSORS


def safetensors_writer(path: Path | str, **options: Any) -> FileSystemWriter:
    return FileSystemWriter(path, serialization_format=SerializationFormat.SAFETENSORS, **options)


@pytest.mark.parametrize("num_files", [1, 3])
def test_positions_of_the_metadata_are_not_believed(tmp_path: Path, num_files: int) -> None:
    state = {"optim": {"state": {fqn: {"exp_avg": full_tensor(fqn, "exp_avg", s)} for fqn, s in SHAPES.items()}}}
    save_alone(state, tmp_path / "ckpt", storage_writer=safetensors_writer(tmp_path / "ckpt", thread_count=num_files))
    check_oracle(tmp_path / "ckpt")
    catalog = open_checkpoint(tmp_path / "ckpt")
    assert verify_checkpoint(catalog, storage_of(catalog), concurrency=2) == []


def test_one_file_an_item(tmp_path: Path) -> None:
    """Then objects are in files of their own, and everything can be read."""
    writer = safetensors_writer(tmp_path / "ckpt", single_file_per_rank=False)
    save_alone(
        {"weight": full_tensor("weight", "exp_avg", (6, 4)), "epoch": 3}, tmp_path / "ckpt", storage_writer=writer
    )
    catalog = open_checkpoint(tmp_path / "ckpt")
    assert torch.equal(load_whole(catalog)["weight"], full_tensor("weight", "exp_avg", (6, 4)))
    storage = storage_of(catalog)
    assert read_object(catalog, "epoch", storage, Counters()) == 3
    storage.close()


def test_objects_among_tensors_are_refused(tmp_path: Path) -> None:
    state = {"weight": torch.ones(6, 4), "epoch": 3}
    save_alone(state, tmp_path / "ckpt", storage_writer=safetensors_writer(tmp_path / "ckpt"))
    says = (
        r"^weight: was saved with SerializationFormat\.SAFETENSORS, .*__0_0\.distcp: begins with a zip record, .*"
        r"Save again with FileSystemWriter's default format"
    )
    with pytest.raises(CatalogError, match=says):
        open_checkpoint(tmp_path / "ckpt")


def save_two_shards(path: str) -> None:
    whole = full_tensor("weight", "exp_avg", (6, 4))
    shards = [LocalShard.from_tensor_and_offsets(whole[r : r + 3].clone(), [r, 0], dist.get_rank()) for r in (0, 3)]
    dcp.save({"weight": init_from_local_shards(shards, (6, 4))}, storage_writer=safetensors_writer(path))


def test_two_shards_of_one_tensor_in_one_file_are_refused(ranks: RankPool, tmp_path: Path) -> None:
    """The writer kept only one of them."""
    ranks.run(1, save_two_shards, str(tmp_path / "ckpt"))
    says = (
        r"^weight: was saved .*__0_0\.distcp holds torch\.float32 of shape \(3, 4\) from \(\d, 0\) on, "
        r"not torch\.float32 of shape \(3, 4\) from \(\d, 0\) on"
    )
    with pytest.raises(CatalogError, match=says):
        open_checkpoint(tmp_path / "ckpt")
