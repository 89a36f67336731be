"""Catalogs built in columns, held against a table built one chunk at a time."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from benchmarks.synthetic_save import SyntheticSave
from shardferry.checkpoint.build import build_catalog
from shardferry.checkpoint.catalog import NO_FILE, Catalog
from shardferry.checkpoint.columns import RaggedArray
from shardferry.checkpoint.metadata import parse_metadata
from shardferry.errors import CatalogError

Box = tuple[tuple[int, ...], tuple[int, ...]]
Place = tuple[str, int, int]  # file, byte offset, byte length

SHAPES = {"scalar": (), "vector": (5,), "matrix": (4, 3), "nothing": (0, 2), "same": (4, 3)}


@dataclass
class Part:
    """One rank's metadata, in plain words."""

    chunks: dict[str, list[Box]] = field(default_factory=dict)
    items: list[tuple[str, tuple[int, ...] | None, Place]] = field(default_factory=list)

    def parsed(self) -> Any:
        tensors = {
            key: TensorStorageMetadata(
                TensorProperties(dtype=torch.float32),
                torch.Size(SHAPES[key]),
                [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in boxes],
            )
            for key, boxes in self.chunks.items()
        }
        storage = {MetadataIndex(key, offsets): _StorageInfo(*place) for key, offsets, place in self.items}
        return parse_metadata(pickle.dumps(Metadata(tensors, None, storage)), source="x")


def expected(parts: Sequence[Part]) -> dict[str, dict[Box, Place | None]]:
    """The stored place of each box, in the order in which boxes come first; of replicas the first that is stored counts."""
    found: dict[str, dict[Box, Place | None]] = {}
    for part in parts:
        table = {(key, offsets): place for key, offsets, place in part.items}
        for key, boxes in part.chunks.items():
            places = found.setdefault(key, {})
            for box in boxes:
                place = table.get((key, box[0])) or (table.get((key, None)) if len(boxes) == 1 else None)
                places[box] = places.get(box) or place
    return found


def content(catalog: Catalog) -> dict[str, dict[Box, Place | None]]:
    """The same of a catalog."""
    found: dict[str, dict[Box, Place | None]] = {}
    for key, tensor in catalog.tensors.items():
        places: dict[Box, Place | None] = {}
        for chunk in tensor.chunks:
            region, file = catalog.region(tensor, chunk), catalog.chunk_file[chunk]
            assert (region.offsets, region.sizes) not in places, "a replica is left"
            place = int(catalog.chunk_byte_offset[chunk]), int(catalog.chunk_byte_length[chunk])
            places[region.offsets, region.sizes] = None if file == NO_FILE else (catalog.files[file], *place)
        found[key] = places
    return found


@st.composite
def boxes_in(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    offsets = tuple(draw(st.integers(0, length)) for length in shape)
    sizes = tuple(draw(st.integers(0, length - offset)) for offset, length in zip(offsets, shape, strict=True))
    return offsets, sizes


@st.composite
def parts(draw: st.DrawFn) -> Part:
    part = Part()
    for key in draw(st.lists(st.sampled_from(sorted(SHAPES)), unique=True)):
        part.chunks[key] = draw(st.lists(boxes_in(SHAPES[key]), max_size=4))
    # Items that fit a chunk, that fit none, whose offsets have another number of dimensions, and without any.
    offsets = [box[0] for boxes in part.chunks.values() for box in boxes] + [(-1,), (9,), (0, 0), (), (0, 0, 0)]
    keys = st.sampled_from([*SHAPES, "unknown"])
    places = st.tuples(st.sampled_from(["a.distcp", "b/c.distcp"]), st.integers(0, 9), st.integers(0, 9))
    part.items = draw(st.lists(st.tuples(keys, st.sampled_from([*offsets, None]), places), max_size=12))
    return part


@given(st.lists(parts(), min_size=1, max_size=3))
def test_each_box_once_and_where_it_is_stored(saved: list[Part]) -> None:
    catalog = build_catalog([("x", part.parsed()) for part in saved], location="ckpt")
    wanted = expected(saved)
    assert content(catalog) == wanted
    assert [list(places) for places in content(catalog).values()] == [list(places) for places in wanted.values()]
    used = {place[0] for places in wanted.values() for place in places.values() if place}
    assert set(catalog.files) == used
    assert len(catalog.problems) == sum(place is None for places in wanted.values() for place in places.values())


def test_a_save_of_many_ranks_lies_where_torch_says() -> None:
    save = SyntheticSave(num_parameters=7, grid=(13, 3), num_files=5)
    metadata = save.metadata()
    catalog = build_catalog([("x", parse_metadata(pickle.dumps(metadata), source="x"))], location="ckpt")
    assert catalog.num_chunks == save.num_chunks == 7 * 3 * 13 * 3
    wanted = {
        (index.fqn, tuple(index.offset or ())): (info.relative_path, info.offset, info.length)
        for index, info in metadata.storage_data.items()
    }
    found = {(key, box[0]): place for key, places in content(catalog).items() for box, place in places.items()}
    assert found == wanted
    assert catalog.problems == ()


def unpickled(metadata: Metadata) -> Any:
    return parse_metadata(pickle.dumps(metadata), source="x")


def of_one(offsets: Any = (0,), sizes: Any = (4,), size: Any = (4,), **info: Any) -> Metadata:
    """One whole tensor and another one with a chunk; whatever is not an integer comes from somebody's own writer."""
    chunk, other = ChunkStorageMetadata(offsets, sizes), ChunkStorageMetadata(torch.Size((0,)), torch.Size((4,)))
    tensors = {
        "first": TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size((4,)), [other]),
        "bad": TensorStorageMetadata(TensorProperties(dtype=torch.float32), size, [chunk]),
    }
    place = _StorageInfo(**{"relative_path": "a", "offset": 0, "length": 16, **info})
    return Metadata(tensors, None, {MetadataIndex("bad", torch.Size((0,))): place})


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        pytest.param(of_one(offsets=("a",)), "x: bad: incomplete tensor metadata (invalid literal", id="text"),
        pytest.param(of_one(offsets=(None,)), "x: bad: incomplete tensor metadata (int() argument", id="None"),
        pytest.param(of_one(offsets=7), "x: bad: incomplete tensor metadata (object of type 'int'", id="no row"),
        pytest.param(of_one(sizes=(2**70,)), "x: bad: incomplete tensor metadata (Python int too large", id="2**70"),
        pytest.param(of_one(sizes=()), "x: bad: chunk at (0,) of sizes () is outside the shape (4,)", id="no size"),
        pytest.param(of_one(sizes=(2**63 - 1,)), f"of sizes ({2**63 - 1},) is outside the shape (4,)", id="2**63"),
        pytest.param(of_one(size=(2**40, 2**40)), "x: bad: no tensor has the shape (1099511627776, ", id="2**80"),
        pytest.param(of_one(size=(-4,)), "x: bad: no tensor has the shape (-4,)", id="negative"),
        pytest.param(
            of_one(length="many"), "x: an incomplete entry in the storage table (invalid literal", id="length"
        ),
        pytest.param(of_one(offset=2**63), "x: an incomplete entry in the storage table (Python int too", id="2**63 B"),
        pytest.param(
            of_one(transform_descriptors=3),
            "x: an incomplete entry in the storage table ('int' object",
            id="descriptor",
        ),
    ],
)
def test_values_that_are_no_boxes_name_their_tensor(metadata: Metadata, says: str) -> None:
    with pytest.raises(CatalogError, match=re.escape(says)):
        build_catalog([("x", unpickled(metadata))], location="ckpt")


class Crafted(pickle._Pickler):
    """Leaves out what makes a chunk what it is: pickles that no class of torch's writes."""

    def __init__(self, file: io.BytesIO, replacement: Any) -> None:
        super().__init__(file)
        self._replacement = replacement

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        super().save(self._replacement if isinstance(obj, ChunkStorageMetadata) else obj, save_persistent_id)


class NoState:
    """Pickled as a chunk to which no state was ever given."""

    def __reduce__(self) -> Any:
        return ChunkStorageMetadata, ()


class ListItems:
    """Pickled as a chunk that was given items as if it were a list."""

    def __reduce__(self) -> Any:
        return ChunkStorageMetadata, (), None, iter([7, 8])


@pytest.mark.parametrize("replacement", [NoState(), ListItems(), 5, [1, 2]], ids=["none", "items", "int", "list"])
def test_pickles_that_make_other_things_of_chunks(replacement: Any) -> None:
    file = io.BytesIO()
    Crafted(file, replacement).dump(of_one())
    with pytest.raises(CatalogError, match="x: first: incomplete tensor metadata"):
        build_catalog([("x", parse_metadata(file.getvalue(), source="x"))], location="ckpt")


ROWS = st.lists(st.lists(st.integers(-(2**60), 2**60), max_size=3).map(tuple), max_size=6)


@given(ROWS, st.data())
def test_ragged_rows(rows: list[tuple[int, ...]], data: st.DataObject) -> None:
    ragged = RaggedArray.from_rows(rows)
    assert [ragged.row(index) for index in range(len(ragged.lengths))] == rows
    assert ragged.sums().tolist() == [sum(row) for row in rows]
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1))) if rows else []
    taken = ragged.take(np.array(chosen, dtype=np.int64))
    assert [taken.row(index) for index in range(len(taken.lengths))] == [rows[index] for index in chosen]
    joined = RaggedArray.concatenate([ragged, taken])
    assert joined.flat.tolist() == [value for row in [*rows, *(rows[index] for index in chosen)] for value in row]
