"""Catalogs of what stock torch saved, and what is said of metadata that makes none."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as ShardedTensorProperties
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from shardferry.checkpoint.catalog import Catalog, SavedTensor
from shardferry.checkpoint.open import open_checkpoint
from shardferry.errors import CatalogError, CheckpointNotFound, UnsafeMetadata
from tests.support.alone import save_alone
from tests.support.damage import edit_metadata, forbidden_global, index_of
from tests.support.oracle import full_tensor

OBJECTS = {"name": "adamw", "betas": (0.5, 0.25), "epoch": 3}
MATRIX = "model.matrix"


def tensors() -> dict[str, torch.Tensor]:
    return {
        "matrix": full_tensor("matrix", "weight", (6, 4)),
        "vector": full_tensor("vector", "weight", (5,), torch.int64),
        "scalar": torch.tensor(7.0),
        "empty": torch.zeros(0, 3),
        "bf16": full_tensor("bf16", "weight", (3, 3), torch.bfloat16),
        "fp8": torch.tensor([1.0, 2.0, -4.0]).to(torch.float8_e4m3fn),
        "bool": torch.tensor([True, False, True]),
    }


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Written by stock torch in one process."""
    path = tmp_path / "ckpt"
    save_alone({"model": tensors(), "extra": dict(OBJECTS)}, path)
    return path


def torch_metadata(path: Path) -> Metadata:
    return pickle.loads((path / ".metadata").read_bytes())


def places(catalog: Catalog) -> dict[tuple[str, tuple[int, ...] | None], tuple[str, int, int]]:
    """File, byte offset and byte length of each item, by key and offsets of its box."""
    found: dict[tuple[str, tuple[int, ...] | None], tuple[str, int, int]] = {}
    for tensor in catalog.tensors.values():
        for chunk in tensor.chunks:
            byte_offset, byte_length = catalog.chunk_byte_offset[chunk], catalog.chunk_byte_length[chunk]
            file = catalog.files[catalog.chunk_file[chunk]]
            found[tensor.key, catalog.region(tensor, chunk).offsets] = (file, int(byte_offset), int(byte_length))
    for item in catalog.objects.values():
        found[item.key, None] = (catalog.files[item.file], item.byte_offset, item.byte_length)
    return found


def shapes_and_dtypes(catalog: Catalog) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {key: (tensor.shape, tensor.dtype) for key, tensor in catalog.tensors.items()}


def test_every_item_lies_where_torch_says(saved: Path) -> None:
    metadata, catalog = torch_metadata(saved), open_checkpoint(saved)
    assert places(catalog) == {
        (index.fqn, None if index.offset is None else tuple(index.offset)): (
            info.relative_path,
            info.offset,
            info.length,
        )
        for index, info in metadata.storage_data.items()
    }
    assert len(places(catalog)) == len(tensors()) + len(OBJECTS)
    assert catalog.problems == ()


def test_shapes_dtypes_chunks_and_paths_are_those_of_torch(saved: Path) -> None:
    metadata, catalog = torch_metadata(saved), open_checkpoint(saved)
    assert shapes_and_dtypes(catalog) == {f"model.{key}": (tuple(t.shape), t.dtype) for key, t in tensors().items()}
    for key, tensor in catalog.tensors.items():
        theirs = [(tuple(c.offsets), tuple(c.sizes)) for c in metadata.state_dict_metadata[key].chunks]
        ours = [catalog.region(tensor, chunk) for chunk in tensor.chunks]
        assert [(region.offsets, region.sizes) for region in ours] == theirs, key
    objects = {key for key, value in metadata.state_dict_metadata.items() if isinstance(value, BytesStorageMetadata)}
    assert set(catalog.objects) == objects == {f"extra.{key}" for key in OBJECTS}
    assert {key: catalog.path(key) for key in metadata.planner_data} == metadata.planner_data
    assert catalog.total_bytes == sum(t.numel() * t.element_size() for t in tensors().values())


def test_the_item_at_each_place_is_the_value(saved: Path) -> None:
    whole = {f"model.{key}": tensor for key, tensor in tensors().items()}
    for (key, _), (file, byte_offset, byte_length) in places(open_checkpoint(saved)).items():
        item = (saved / file).read_bytes()[byte_offset : byte_offset + byte_length]
        value = torch.load(io.BytesIO(item), weights_only=True)
        if key in whole:
            assert (value.dtype, value.tolist()) == (whole[key].dtype, whole[key].tolist()), key
        else:
            assert value == OBJECTS[key.removeprefix("extra.")]


def as_torch_2_1(metadata: Metadata) -> None:
    """torch 2.1 and 2.2: the sharded tensors' TensorProperties, and neither storage_meta nor version."""
    for value in metadata.state_dict_metadata.values():
        if not isinstance(value, BytesStorageMetadata):
            value.properties = ShardedTensorProperties(dtype=value.properties.dtype)
    for later in ("storage_meta", "version"):
        metadata.__dict__.pop(later, None)


@pytest.mark.conformance(17)
def test_metadata_of_torch_2_1(saved: Path) -> None:
    before = open_checkpoint(saved)
    edit_metadata(saved, as_torch_2_1)
    data = (saved / ".metadata").read_bytes()
    assert b"MEM_FORMAT_ENCODING" in data
    assert b"_MEM_FORMAT_ENCODING" not in data
    assert b"storage_meta" not in data
    catalog = open_checkpoint(saved)
    assert (places(catalog), shapes_and_dtypes(catalog)) == (places(before), shapes_and_dtypes(before))
    assert catalog.torch_metadata_version == "unversioned"


def test_without_planner_data_the_keys_are_the_paths(saved: Path) -> None:
    before = open_checkpoint(saved)
    edit_metadata(saved, lambda metadata: setattr(metadata, "planner_data", None))
    catalog = open_checkpoint(saved)
    assert catalog.paths is None
    assert catalog.path(MATRIX) == (MATRIX,)
    assert before.path(MATRIX) == ("model", "matrix")
    assert places(catalog) == places(before)


def test_a_chunk_without_a_file_is_a_problem_of_the_catalog(saved: Path) -> None:
    def forget(metadata: Metadata) -> None:
        del metadata.storage_data[next(index for index in metadata.storage_data if index.fqn == MATRIX)]

    edit_metadata(saved, forget)
    catalog = open_checkpoint(saved)
    matrix: SavedTensor = catalog.tensors[MATRIX]
    assert [catalog.chunk_file[chunk] for chunk in matrix.chunks] == [-1]
    assert [problem.partition(":")[0] for problem in catalog.problems] == [MATRIX]


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        pytest.param(Metadata({}), "holds no table of stored items", id="no storage table"),
        pytest.param(Metadata({}, None, {"a": 1}), "keyed by str, not MetadataIndex", id="other keys"),
        pytest.param(Metadata({"a": 1}, None, {}), "a: is a int, neither tensor nor bytes", id="an int"),
        pytest.param(Metadata({1: 1}, None, {}), "the key 1 is a int, not a string", id="a key that is not a string"),
        pytest.param(
            Metadata({"\ud800": 1}, None, {}), "is not text: it holds half of a character", id="half a character"
        ),
    ],
)
def test_metadata_of_something_else_names_the_file(tmp_path: Path, metadata: Metadata, says: str) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CatalogError, match=re.escape(says)) as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / '.metadata'}: ")


def outside_box(metadata: Metadata) -> None:
    metadata.state_dict_metadata[MATRIX].chunks[0].sizes = torch.Size((7, 4))


def no_dtype(metadata: Metadata) -> None:
    del metadata.state_dict_metadata[MATRIX].__dict__["properties"]


def negative_length(metadata: Metadata) -> None:
    metadata.storage_data[index_of(metadata, MATRIX)].length = -1


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (outside_box, "chunk at (0, 0) of sizes (7, 4) is outside the shape (6, 4)"),
        (no_dtype, "incomplete tensor metadata"),
        (negative_length, "with -1 bytes"),
    ],
)
def test_contradictions_name_file_and_key(saved: Path, edit: Callable[[Metadata], None], says: str) -> None:
    edit_metadata(saved, edit)
    with pytest.raises(CatalogError, match=re.escape(says)) as caught:
        open_checkpoint(saved)
    assert str(caught.value).startswith(f"{saved / '.metadata'}: {MATRIX}: ")


@pytest.mark.conformance(21)
def test_a_command_is_refused_that_a_careless_reader_would_run(saved: Path) -> None:
    forbidden_global(saved)
    with pytest.raises(UnsafeMetadata, match=r"names the global (os|posix)\.system"):
        open_checkpoint(saved)
    assert not (saved / "executed").exists()
    pickle.loads((saved / ".metadata").read_bytes())
    assert (saved / "executed").exists()


def test_a_save_that_was_not_completed(saved: Path) -> None:
    (saved / ".metadata").unlink()
    with pytest.raises(CheckpointNotFound, match=r"no \.metadata file among 1 files .* the save was not completed"):
        open_checkpoint(saved)
