"""What verify says of checkpoints of every kind, whole and damaged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.serialization import get_crc32_options, set_crc32_options

from shardferry.checkpoint.open import open_checkpoint, storage_of
from shardferry.read.verify import verified_bytes, verify_checkpoint
from tests.support.alone import save_alone
from tests.support.oracle import full_tensor


def problems_of(path: Path) -> list[str]:
    catalog = open_checkpoint(path)
    storage, seen = storage_of(catalog), []
    try:
        problems = verify_checkpoint(catalog, storage, concurrency=2, on_item=seen.append)
    finally:
        storage.close()
    assert sum(seen) == verified_bytes(catalog)
    return problems


@pytest.fixture(params=[True, False], ids=["checksums", "no checksums"])
def checksums(request: pytest.FixtureRequest) -> Iterator[bool]:
    before = get_crc32_options()
    set_crc32_options(request.param)
    yield request.param
    set_crc32_options(before)


def test_a_flipped_bit_is_found_where_there_are_checksums(tmp_path: Path, checksums: bool) -> None:
    save_alone({"a": full_tensor("a", "exp_avg", (500,)), "epoch": [1, 2, 3]}, tmp_path / "ckpt")
    assert problems_of(tmp_path / "ckpt") == []
    file = tmp_path / "ckpt" / "__0_0.distcp"
    data, raw = bytearray(file.read_bytes()), full_tensor("a", "exp_avg", (500,)).numpy().tobytes()
    data[data.index(raw) + 1000] ^= 1
    file.write_bytes(data)
    problems = problems_of(tmp_path / "ckpt")
    assert len(problems) == checksums
    assert all(problem.startswith("a: item at byte ") and "checksum" in problem for problem in problems)


def test_a_damaged_head_is_told_once(tmp_path: Path) -> None:
    save_alone({"a": torch.ones(4, 4), "b": torch.ones(3)}, tmp_path / "ckpt")
    file = tmp_path / "ckpt" / "__0_0.distcp"
    file.write_bytes(file.read_bytes().replace(b"PK\x03\x04", b"PK\x03\x05", 1))
    (problem,) = problems_of(tmp_path / "ckpt")
    assert problem.count("item at byte 0 of __0_0.distcp") == 1
    assert "no zip record at byte 0 of the item" in problem


def test_safetensors_files_are_read_to_their_end(tmp_path: Path) -> None:
    save_file({"a": torch.ones(700_000)}, tmp_path / "model.safetensors")
    assert problems_of(tmp_path) == []
    catalog = open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-1])
    storage = storage_of(catalog)
    (problem,) = verify_checkpoint(catalog, storage, concurrency=1)
    storage.close()
    assert problem.startswith("a: item at byte ")
    assert "the file has" in problem


def test_each_spoilt_byte_of_a_zips_directory_is_told_or_harmless(tmp_path: Path) -> None:
    """Python's zipfile has an exception of another class for nearly each field."""
    save_alone({"a": full_tensor("a", "exp_avg", (5,))}, tmp_path / "ckpt")
    file = tmp_path / "ckpt" / "__0_0.distcp"
    whole = file.read_bytes()
    told = 0
    for position in range(whole.index(b"PK\1\2"), len(whole)):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        told += any(problem.startswith("a: ") for problem in problems_of(tmp_path / "ckpt"))
    assert told > 100
