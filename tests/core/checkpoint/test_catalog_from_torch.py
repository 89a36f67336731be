"""Catalogs of torch's in-memory metadata: as those of the same metadata's file, but for the bytes' places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from shardferry.checkpoint.from_torch import catalog_from_torch
from shardferry.checkpoint.open import open_checkpoint
from shardferry.errors import CatalogError, PlanError
from shardferry.plan.cover import covering_chunks
from shardferry.region import Region


def boxes(catalog: Any, tensor: Any) -> set[tuple[Any, ...]]:
    offsets, sizes = catalog.boxes(tensor)
    return {(*o, *s) for o, s in zip(offsets.tolist(), sizes.tolist(), strict=True)}


def test_same_as_the_catalog_of_the_file(saved_by: dict[int, Path]) -> None:
    expected = open_checkpoint(saved_by[3])
    catalog = catalog_from_torch(FileSystemReader(saved_by[3]).read_metadata(), location=str(saved_by[3]))
    assert catalog.objects.keys() == expected.objects.keys()
    assert catalog.paths == expected.paths
    assert catalog.tensors.keys() == expected.tensors.keys()
    for key, tensor in expected.tensors.items():
        found = catalog.tensors[key]
        assert (found.shape, found.dtype) == (tensor.shape, tensor.dtype)
        assert boxes(catalog, found) == boxes(expected, tensor)


def metadata_of(
    shape: tuple[int, ...], *chunks: tuple[tuple[int, ...], tuple[int, ...]], paths: Any = None
) -> Metadata:
    saved = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in chunks]
    tensor = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size(shape), saved)
    return Metadata({"w": tensor, "other": tensor}, paths)


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        (
            [((0,), (3,)), ((5,), (3,))],
            r"w: 2 of 8 wanted elements are in no saved chunk, first at \[3:5\] of the shape \(8,\)",
        ),
        ([((0,), (5,)), ((3,), (5,))], r"w: \[3:5\] is saved twice, in the reader's storage as part of \[0:5\] and in"),
    ],
    ids=["hole", "overlap"],
)
def test_the_proof_of_cover_holds_for_it(chunks: Any, message: str) -> None:
    catalog = catalog_from_torch(metadata_of((8,), *chunks), location="ckpt", keys=["w"])
    assert list(catalog.tensors) == ["w"]
    with pytest.raises(PlanError, match=message):
        covering_chunks(catalog, catalog.tensors["w"], Region((0,), (8,)))
    assert covering_chunks(catalog, catalog.tensors["w"], Region((6,), (2,))) == [(1, Region(*chunks[1]))]


@pytest.mark.parametrize(("offsets", "sizes"), [((0, 0), (8,)), ((0,), (8, 1)), ((), ())])
def test_chunks_of_other_dimensions(offsets: Any, sizes: Any) -> None:
    with pytest.raises(CatalogError, match=r"ckpt: w: chunk at .* in a tensor of the shape \(8,\)"):
        catalog_from_torch(metadata_of((8,), (offsets, sizes)), location="ckpt")


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (None, None),
        (["anything"], None),
        ({}, {}),
        ({"w": ("a", 0), "other": ["a", "b"]}, {"w": ("a", 0), "other": ("a", "b")}),
        ({"w": "not a path", "other": ()}, {}),
    ],
)
def test_paths_of_any_planner(paths: Any, expected: Any) -> None:
    """What is not a path counts as not recorded."""
    assert catalog_from_torch(metadata_of((8,), paths=paths), location="ckpt").paths == expected
