"""Checkpoints whose items the writer compressed: read whole, decoded, and then cut as all others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint._extension import ZStandard

from shardferry.checkpoint.catalog import TransformedItem
from shardferry.checkpoint.open import open_checkpoint, storage_of
from shardferry.config import ReadOptions
from shardferry.errors import DecodeError
from shardferry.layout.tensor_layout import single_box
from shardferry.plan.planner import plan_tensors
from shardferry.read.execute import read_objects
from shardferry.read.schedule import requests_of_plan
from shardferry.read.transforms import ZSTANDARD
from shardferry.read.verify import verified_bytes, verify_checkpoint
from shardferry.region import Region
from shardferry.stats import Counters
from shardferry.storage.local import LOCAL_FILES
from tests.support import damage
from tests.support.alone import save_alone
from tests.support.loads import bits, load_boxes, load_whole
from tests.support.oracle import full_tensor

pytestmark = pytest.mark.conformance(15)

LIMITS = LOCAL_FILES.read_limits(ReadOptions())

TENSORS = {
    "matrix": full_tensor("matrix", "exp_avg", (64, 48)),
    "transposed": full_tensor("transposed", "exp_avg", (48, 64), torch.float64).t(),
    "channels_last": full_tensor("cl", "exp_avg", (4, 8, 6, 6)).contiguous(memory_format=torch.channels_last),
    "bf16": full_tensor("bf16", "exp_avg", (1000,), torch.bfloat16),
    "scalar": torch.tensor(7.0),
    "fp8": torch.arange(-20.0, 20.0).to(torch.float8_e4m3fn),
}
OBJECTS = {"lr": 0.25, "betas": [0.5, 0.75], "name": "adamw"}


def save(path: Path, *, num_files: int = 1) -> Path:
    writer = FileSystemWriter(path, thread_count=num_files, _extensions=[ZStandard()])
    save_alone({"state": TENSORS, "param_groups": OBJECTS}, path, storage_writer=writer)
    return path


@pytest.fixture(params=[1, 3])
def saved(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return save(tmp_path / "ckpt", num_files=request.param)


def test_every_tensor_and_object(saved: Path) -> None:
    catalog = open_checkpoint(saved)
    assert TransformedItem((f"{ZSTANDARD}/1",)) in catalog.formats
    found = load_whole(catalog)
    for name, tensor in TENSORS.items():
        assert bits(found[f"state.{name}"]) == bits(tensor), name
    storage = storage_of(catalog)
    objects = {
        key.removeprefix("param_groups."): read_objects([key], catalog, storage, ReadOptions(), Counters())[key]
        for key in catalog.objects
    }
    storage.close()
    assert objects == OBJECTS


@pytest.mark.parametrize("concurrency", [1, 8])
def test_an_item_is_read_once_however_many_boxes_of_it_are_wanted(tmp_path: Path, concurrency: int) -> None:
    catalog = open_checkpoint(save(tmp_path / "ckpt"))
    wanted = {
        "state.matrix": [Region((0, 0), (7, 48)), Region((20, 5), (30, 9)), Region((63, 47), (1, 1))],
        "state.transposed": [Region((10, 0), (5, 48)), Region((0, 13), (64, 2))],
        "state.channels_last": [Region((1, 2, 0, 3), (2, 5, 6, 2))],
    }
    boxes = [(key, region) for key, regions in wanted.items() for region in regions]
    found, counters = load_boxes(catalog, boxes, concurrency=concurrency)
    for (key, region), tensor in zip(boxes, found, strict=True):
        whole = TENSORS[key.removeprefix("state.")]
        assert bits(tensor) == bits(whole[tuple(map(slice, region.offsets, region.ends))]), (key, region)
    lengths = [int(catalog.chunk_byte_length[catalog.tensors[key].chunks[0]]) for key in wanted]
    plan = plan_tensors(
        catalog, [(key, single_box(catalog.tensors[key].shape, r)) for key, r in boxes], world_rank=0, world_size=1
    )
    # Boxes of one tensor are tensors of their own here, and its chunk is still one.
    assert (
        (counters.bytes_requested, counters.num_requests)
        == (sum(lengths), 3)
        == requests_of_plan(plan, catalog, LIMITS)
    )


def test_verify(saved: Path) -> None:
    catalog = open_checkpoint(saved)
    assert verify_checkpoint(catalog, storage_of(catalog), concurrency=2) == []
    assert verified_bytes(catalog) == sum(file.stat().st_size for file in saved.glob("*.distcp"))


def test_one_damaged_byte(tmp_path: Path) -> None:
    path = save(tmp_path / "ckpt")
    catalog = open_checkpoint(path)
    chunk = catalog.tensors["state.matrix"].chunks[0]
    start, length = int(catalog.chunk_byte_offset[chunk]), int(catalog.chunk_byte_length[chunk])
    data = bytearray((path / "__0_0.distcp").read_bytes())
    data[start + 2] ^= 0xFF  # of the frame's magic number
    (path / "__0_0.distcp").write_bytes(data)
    catalog = open_checkpoint(path)
    says = (
        rf"state\.matrix: item at byte {start} of __0_0\.distcp: its {length} compressed bytes .*; the file is damaged"
    )
    with pytest.raises(DecodeError, match="^" + says):
        load_whole(catalog)
    (problem,) = verify_checkpoint(catalog, storage_of(catalog), concurrency=2)
    assert problem.startswith(f"state.matrix: item at byte {start} of __0_0.distcp: its {length} compressed bytes")


def test_a_frame_that_is_cut(tmp_path: Path) -> None:
    path = save(tmp_path / "ckpt")
    catalog = open_checkpoint(path)
    chunk = catalog.tensors["state.matrix"].chunks[0]
    catalog.chunk_byte_length[chunk] -= 5
    with pytest.raises(DecodeError, match=r"state\.matrix: .* compressed bytes are not one whole frame"):
        load_whole(catalog)


@pytest.mark.parametrize("descriptor", ["stream.zstd/2", "stream.zstd", "stream.secret@mine/1"])
def test_a_transformation_that_is_not_known(tmp_path: Path, descriptor: str) -> None:
    path = tmp_path / "ckpt"
    save_alone({"optim": {"state": {"even.weight": {"exp_avg": torch.ones(4, 4)}}}}, path)
    damage.replace_info(path, transform_descriptors=[descriptor])
    says = (
        rf"^{damage.KEY}: item at byte 0 of .*: it was transformed by '{descriptor}', .* save without this extension$"
    )
    with pytest.raises(DecodeError, match=says):
        load_whole(open_checkpoint(path))


def test_no_package_to_decompress_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "ckpt")
    for package in ("zstandard", "pyzstd"):
        monkeypatch.setitem(sys.modules, package, None)  # Python's way to say that it can't be imported
    with pytest.raises(DecodeError, match="neither zstandard nor pyzstd is installed: install one"):
        load_whole(open_checkpoint(path))
