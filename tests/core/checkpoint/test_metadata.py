"""Metadata of every torch since 2.1, and metadata that nobody should open."""

from __future__ import annotations

import os
import pickle
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed._shard.sharded_tensor import metadata as old_metadata
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

import shardferry
from shardferry.errors import CatalogError, CheckpointNotFound, UnsafeMetadata
from tests.support import damage
from tests.support.alone import save_alone

STATE = {
    "matrix": torch.arange(12.0).view(3, 4),
    "half": torch.ones(5, dtype=torch.bfloat16),
    "eighth": torch.ones(2, 2).to(torch.float8_e4m3fn),
    "flags": torch.tensor([True, False]),
    "number": torch.tensor(3.0),
    "nothing": torch.empty(0, 4),
    "object": {"lr": 0.5},
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_alone({"state": STATE}, tmp_path / "ckpt")
    return tmp_path / "ckpt"


def test_every_chunks_file_position_length_dtype_and_shape(checkpoint: Path) -> None:
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    catalog = shardferry.open_checkpoint(checkpoint)
    assert catalog.problems == ()
    for key, tensor in STATE.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        saved = catalog.tensors[f"state.{key}"]
        assert (saved.shape, saved.dtype, len(saved.chunks)) == (tuple(tensor.shape), tensor.dtype, 1)
        info = metadata.storage_data[damage.index_of(metadata, f"state.{key}")]
        (chunk,) = saved.chunks
        assert catalog.files[catalog.chunk_file[chunk]] == info.relative_path
        assert (catalog.chunk_byte_offset[chunk], catalog.chunk_byte_length[chunk]) == (info.offset, info.length)
        assert catalog.region(saved, chunk) == shardferry.Region.whole(tensor.shape)
    assert catalog.path("state.object.lr") == ("state", "object", "lr")
    assert set(catalog.objects) == {"state.object.lr"}


def rewrite(checkpoint: Path, properties: Any, **attributes: Any) -> None:
    """Write the metadata as another torch would: other properties of each tensor, other attributes."""

    def edit(metadata: Metadata) -> None:
        for value in metadata.state_dict_metadata.values():
            if isinstance(value, TensorStorageMetadata):
                value.properties = properties(value.properties.dtype)
        for name, value in attributes.items():
            setattr(metadata, name, value)

    damage.edit_metadata(checkpoint, edit)


def as_2_1(dtype: torch.dtype) -> Any:
    """Properties that live where torch 2.1 and 2.2 had them."""
    return old_metadata.TensorProperties(dtype=dtype)


@pytest.mark.conformance(17)
@pytest.mark.parametrize("version", ["2.1", "2.4 to 2.14", "2.15"])
def test_tensor_properties_of_each_torch(checkpoint: Path, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = shardferry.open_checkpoint(checkpoint)
    if version == "2.1":
        rewrite(checkpoint, as_2_1, storage_meta=None)
        assert b"_shard.sharded_tensor.metadata" in (checkpoint / ".metadata").read_bytes()
    elif version == "2.15":
        five = TensorProperties.__getstate__
        monkeypatch.setattr(TensorProperties, "__getstate__", lambda self: (*five(self), (4, 1)))
        rewrite(checkpoint, lambda dtype: TensorProperties(dtype=dtype))
        with pytest.raises(ValueError, match="too many values to unpack"):  # torch up to 2.14 can't read it
            pickle.loads((checkpoint / ".metadata").read_bytes())
    after = shardferry.open_checkpoint(checkpoint)
    assert after.tensors == before.tensors
    assert after.chunk_byte_offset.tolist() == before.chunk_byte_offset.tolist()


@pytest.mark.conformance(9)
def test_without_key_paths(checkpoint: Path) -> None:
    damage.edit_metadata(checkpoint, lambda metadata: setattr(metadata, "planner_data", None))
    assert shardferry.open_checkpoint(checkpoint).path("state.matrix") == ("state.matrix",)


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "C:\\x", "", "."])
def test_paths_stay_inside_the_checkpoint(checkpoint: Path, path: str) -> None:
    def edit(metadata: Metadata) -> None:
        index = damage.index_of(metadata, "state.matrix")
        metadata.storage_data[index].relative_path = path

    damage.edit_metadata(checkpoint, edit)
    with pytest.raises(UnsafeMetadata, match=r"state\.matrix: relative_path .* leaves the checkpoint"):
        shardferry.open_checkpoint(checkpoint)


class Evil:
    """Calls a function of somebody's choice when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


@pytest.mark.conformance(21)
@pytest.mark.parametrize("function", [os.system, eval, torch.load, torch.distributed.init_process_group, Path.touch])
def test_no_global_outside_the_list_is_called(checkpoint: Path, function: Any) -> None:
    damage.edit_metadata(checkpoint, lambda m: setattr(m, "planner_data", Evil(function, str(checkpoint / "x"))))
    with pytest.raises(UnsafeMetadata, match=r"\.metadata: metadata names the global .* nothing was executed"):
        shardferry.open_checkpoint(checkpoint)
    assert not (checkpoint / "x").exists()


@pytest.mark.conformance(20)
def test_cut_anywhere(checkpoint: Path) -> None:
    data = (checkpoint / ".metadata").read_bytes()
    for length in range(0, len(data), 7):
        (checkpoint / ".metadata").write_bytes(data[:length])
        with pytest.raises(CatalogError, match=rf"\.metadata: not readable as checkpoint metadata \({length} bytes"):
            shardferry.open_checkpoint(checkpoint)


def test_random_bytes(checkpoint: Path) -> None:
    generator = random.Random(0)
    for _ in range(200):
        (checkpoint / ".metadata").write_bytes(generator.randbytes(generator.randrange(1, 400)))
        with pytest.raises(CatalogError, match=r"\.metadata: "):
            shardferry.open_checkpoint(checkpoint)


@pytest.mark.parametrize("value", [{}, None, 3, ChunkStorageMetadata(torch.Size([1]), torch.Size([1]))], ids=repr)
def test_another_kind_of_pickle(checkpoint: Path, value: Any) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(value))
    with pytest.raises(CatalogError, match="not the Metadata of a checkpoint"):
        shardferry.open_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("offsets", "sizes"), [((2, 0), (2, 4)), ((-1, 0), (1, 4)), ((0,), (3,)), ((0, 0), (3, -4))], ids=str
)
def test_boxes_outside_their_tensor(checkpoint: Path, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    def edit(metadata: Metadata) -> None:
        chunk = metadata.state_dict_metadata["state.matrix"].chunks[0]
        chunk.offsets, chunk.sizes = torch.Size(offsets), torch.Size(sizes)

    damage.edit_metadata(checkpoint, edit)
    with pytest.raises(CatalogError, match=r"state\.matrix: chunk at .* is outside the shape \(3, 4\)"):
        shardferry.open_checkpoint(checkpoint)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match="no such directory"):
        shardferry.open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointNotFound, match="is a file, not a directory"):
        shardferry.open_checkpoint(tmp_path / "file")
    with pytest.raises(CheckpointNotFound, match=r"no \.metadata file among 1 files \(0 of them \.distcp\): [a-z ]+$"):
        shardferry.open_checkpoint(tmp_path)


def test_the_checkpoints_nearby_are_named(tmp_path: Path) -> None:
    """The directory of a whole run was given, or one inside the checkpoint; of many the newest."""
    for step in range(5):
        (tmp_path / f"step-{step}" / "inner").mkdir(parents=True)
        (tmp_path / f"step-{step}" / ".metadata").touch()
        os.utime(tmp_path / f"step-{step}", (step, step))
    newest = ", ".join(str(tmp_path / f"step-{step}") for step in (2, 3, 4))
    with pytest.raises(CheckpointNotFound, match=re.escape(f"There is one in {newest} and 2 more")):
        shardferry.open_checkpoint(tmp_path)
    with pytest.raises(CheckpointNotFound, match=re.escape(f"There is one in {tmp_path / 'step-1'}") + "$"):
        shardferry.open_checkpoint(tmp_path / "step-1" / "inner")
    with pytest.raises(CheckpointNotFound, match="warp://bucket/run: warp:// can't be opened"):
        shardferry.open_checkpoint("warp://bucket/run")
