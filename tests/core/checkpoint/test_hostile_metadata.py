"""Pickles that are small, and whose values are not: nested a billion times over, or deeper than Python's stack."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from shardferry.checkpoint.open import open_checkpoint
from shardferry.errors import CatalogError
from tests.support import damage
from tests.support.alone import save_alone

KEY = "optim.state.weight.exp_avg"
LR = "optim.param_groups.0.lr"

# Each test would go on for hours, or take all memory.
pytestmark = pytest.mark.timeout(30)


def laughs() -> list[Any]:
    """Ten to the power of forty entries in forty lists."""
    value: list[Any] = ["ha"]
    for _ in range(40):
        value = [value] * 10
    return value


PLACEHOLDER = 0x7A6B5C4D


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    state = {"state": {"weight": {"exp_avg": torch.ones(4)}}, "param_groups": [{"lr": 0.5}]}
    save_alone({"optim": state}, tmp_path / "ckpt")
    assert LR in open_checkpoint(tmp_path / "ckpt").objects
    return tmp_path / "ckpt"


def info(metadata: Metadata) -> Any:
    return next(info for index, info in metadata.storage_data.items() if index.fqn == KEY)


def key_path(metadata: Metadata, value: Any) -> None:
    metadata.planner_data[KEY] = value


def key_path_part(metadata: Metadata, value: Any) -> None:
    metadata.planner_data[KEY] = ("optim", value)


def size(metadata: Metadata, value: Any) -> None:
    metadata.state_dict_metadata[KEY].size = value


def box(metadata: Metadata, value: Any) -> None:
    metadata.state_dict_metadata[KEY].chunks[0].offsets = value


def relative_path(metadata: Metadata, value: Any) -> None:
    info(metadata).relative_path = value


def descriptors(metadata: Metadata, value: Any) -> None:
    info(metadata).transform_descriptors = [value]


def fqn(metadata: Metadata, value: Any) -> None:
    metadata.storage_data[MetadataIndex("extra", torch.Size((0,)))] = info(metadata)
    object.__setattr__(list(metadata.storage_data)[-1], "fqn", value)


@pytest.mark.parametrize("spoil", [key_path, key_path_part, size, box, relative_path, descriptors, fqn])
def test_values_of_exponential_size_are_never_expanded(saved: Path, spoil: Callable[[Metadata, Any], None]) -> None:
    damage.edit_metadata(saved, lambda metadata: spoil(metadata, laughs()))
    with pytest.raises(CatalogError, match=r"/\.metadata: ") as caught:
        open_checkpoint(saved)
    assert len(str(caught.value)) < 20_000


def test_a_version_of_exponential_size(saved: Path) -> None:
    damage.edit_metadata(saved, lambda metadata: setattr(metadata, "version", laughs()))
    assert open_checkpoint(saved).torch_metadata_version == "unversioned"


@pytest.mark.parametrize("spoil", [key_path_part, size, box, relative_path])
def test_deep_values(saved: Path, spoil: Callable[[Metadata, Any], None]) -> None:
    """A hundred thousand lists in one another."""
    file = saved / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    spoil(metadata, PLACEHOLDER)
    data, mark = pickle.dumps(metadata, protocol=2), b"J" + PLACEHOLDER.to_bytes(4, "little")
    assert data.count(mark) == 1
    file.write_bytes(data.replace(mark, b"]" * 100_000 + b"a" * 99_999))
    with pytest.raises(CatalogError, match=r"/\.metadata: "):
        open_checkpoint(saved)


def test_deep_paths(saved: Path) -> None:
    damage.edit_metadata(saved, lambda metadata: metadata.planner_data.update({LR: ("optim", *"x" * 100_000)}))
    with pytest.raises(
        CatalogError, match=rf"/\.metadata: {LR}: stood 100001 levels deep by planner_data; at most 100"
    ):
        open_checkpoint(saved)


@pytest.mark.parametrize("index", [10**9, -1, 10**5000], ids=["large", "negative", "5000 digits"])
def test_param_groups_that_no_optimizer_has(saved: Path, index: int) -> None:
    path = ("optim", "param_groups", index, "lr")
    damage.edit_metadata(saved, lambda metadata: metadata.planner_data.update({LR: path}))
    with pytest.raises(
        CatalogError, match=rf"/\.metadata: {LR}: has the index .* below 'param_groups' by planner_data"
    ):
        open_checkpoint(saved)


def test_a_shape_of_thousands_of_digits(saved: Path) -> None:
    damage.edit_metadata(saved, lambda metadata: size(metadata, (10**5000,)))
    with pytest.raises(
        CatalogError, match=rf"/\.metadata: {KEY}: no tensor has the shape a tuple with very large integers"
    ):
        open_checkpoint(saved)
