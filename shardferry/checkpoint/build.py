"""Turn the parsed metadata of a checkpoint into its catalog, column by column.

Each property of the unpickled values is read once into a column: a million chunks never become a million objects of ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch

from shardferry.checkpoint.catalog import NO_FILE, Catalog, ItemFormat, SavedObject, SavedTensor, ZipItem
from shardferry.checkpoint.columns import (
    MALFORMED,
    NO_ITEM,
    PLACE,
    ChunkColumns,
    ItemColumns,
    Numbers,
    RaggedArray,
    Shapes,
    is_possible,
)
from shardferry.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
    shown,
    states_of,
)
from shardferry.errors import CatalogError, UnsafeMetadata
from shardferry.region import Region
from shardferry.state_dicts import KeyPath

_MAX_PATH_PARTS = 100  # nested values are built and flattened by functions that call themselves
_MAX_PARAM_GROUPS = 1_000_000
_PATH_PARTS = frozenset((str, int))
_PLAIN_NAME = re.compile(r"\w[\w.-]*", re.ASCII)  # of a file directly in the checkpoint


def build_catalog(parts: Iterable[tuple[str, Metadata]], *, location: str) -> Catalog:
    """Build the catalog from the parsed metadata files of one checkpoint: one file, or one per rank.

    Args:
        parts: name and content of each file. They are taken one by one, so that one content is in memory at a time, and the
            contents are used up.
        location: of the checkpoint.

    Raises:
        UnsafeMetadata: the path of a file leads out of the checkpoint.
        CatalogError: boxes or byte positions are malformed or contradict each other.
    """
    builder = _CatalogBuilder(location)
    for source, metadata in parts:
        builder.add(source, metadata)
    return builder.finish()


def saved_tensors(
    keys: Iterable[str], shapes: Iterable[tuple[int, ...]], dtypes: Iterable[torch.dtype], counts: Iterable[int]
) -> dict[str, SavedTensor]:
    """The tensors, by key, whose chunks (``counts``) are stored one tensor after another in the catalog's columns."""
    tensors, chunk, box = {}, 0, 0
    for key, shape, dtype, count in zip(keys, shapes, dtypes, counts, strict=True):
        tensors[key] = SavedTensor(key, shape, dtype, range(chunk, chunk + count), box)
        chunk, box = chunk + count, box + count * len(shape)
    return tensors


def name_inside(relative_path: str) -> str | None:
    """The name of a file inside the checkpoint, in the form that catalogs use; None where the path leads out of it."""
    if _PLAIN_NAME.fullmatch(relative_path):
        return relative_path
    path = PurePosixPath(relative_path)
    outside = path.is_absolute() or ".." in path.parts or PureWindowsPath(relative_path).drive or "\0" in relative_path
    return None if outside or not path.parts else str(path)


_Place = tuple[int, int, int, int]  # a row of PLACE


class _CatalogBuilder:
    def __init__(self, location: str) -> None:
        self._location = location
        self._versions: set[str] = set()
        self._rows: Numbers[str] = Numbers()  # of tensors in the next two lists, by key
        self._shapes: list[tuple[int, ...]] = []
        self._dtypes: list[torch.dtype] = []
        self._chunks: list[ChunkColumns] = []
        self._objects: dict[str, _Place] = {}  # by key
        self._key_paths: dict[str, KeyPath] | None = None
        self._paths: Numbers[str] = Numbers()  # of files, as the metadata writes them
        self._files: Numbers[str] = Numbers()  # of files that hold something, as the catalog names them
        self._formats: Numbers[ItemFormat] = Numbers({ZipItem(): 0})
        self._problems: list[str] = []

    def add(self, source: str, metadata: Metadata) -> None:
        """Add the tensors, objects and items of one metadata file, whose content is used up. Raises CatalogError."""
        items = ItemColumns.take_from(source, metadata, self._paths, self._formats)
        self._versions.add(
            metadata.version if metadata.version and isinstance(metadata.version, str) else "unversioned"
        )
        if metadata.planner_data is not None:
            self._add_key_paths(source, metadata.planner_data)
        rows = np.flatnonzero(items.is_object)
        objects = dict(zip(items.key[rows].tolist(), rows.tolist(), strict=True))  # by the number of the key
        tensors: dict[str, TensorStorageMetadata] = {}
        numbers: list[int] = []  # of their keys
        for number, (key, value) in enumerate(metadata.state_dict_metadata.items()):
            _check_key(source, key)
            if isinstance(value, TensorStorageMetadata):
                self._add_tensor(source, key, value)
                tensors[key] = value
                numbers.append(number)
            elif isinstance(value, BytesStorageMetadata):
                self._add_object(source, key, items.place[objects[number]].tolist() if number in objects else None)
            else:
                raise CatalogError(f"{source}: {key}: is a {type(value).__name__}, neither tensor nor bytes")
        self._chunks.append(self._chunk_columns(source, tensors, numbers, items, objects))
        self._problems += _flattened_by_megatron(metadata)

    def _add_key_paths(self, source: str, paths: Any) -> None:
        if not isinstance(paths, dict):
            name = source.rpartition("/")[2]  # without the location: a checkpoint can be moved
            self._problems.append(
                f"{name}: planner_data is a {type(paths).__name__}; key paths are taken from the keys"
            )
            return
        self._key_paths = {} if self._key_paths is None else self._key_paths
        for key, path in paths.items():
            kinds = set(map(type, path)) if isinstance(path, tuple | list) else set()
            is_path = kinds and _PATH_PARTS.issuperset(kinds)
            if not isinstance(key, str) or not is_path:
                raise CatalogError(
                    f"{source}: planner_data has the path {shown(path)} for the key {shown(key)}, which torch's planners don't write: "
                    "paths are tuples of strings and integers, by key; set planner_data to None, and paths are taken from the keys"
                )
            if len(path) > _MAX_PATH_PARTS:
                raise CatalogError(
                    f"{source}: {key}: stood {len(path)} levels deep by planner_data; at most {_MAX_PATH_PARTS} can be loaded"
                )
            for part, index in pairwise(("", *path)) if int in kinds else ():
                first, end = (0, _MAX_PARAM_GROUPS) if part == "param_groups" else (-(2**63), 2**63)
                if isinstance(index, int) and not first <= index < end:
                    raise CatalogError(
                        f"{source}: {key}: has the index {shown(index)} below {shown(part)} by planner_data, where it is from "
                        f"{first} to {end - 1}. The metadata is damaged; use another checkpoint"
                    )
            if (known := self._key_paths.setdefault(key, tuple(path))) != tuple(path):
                raise CatalogError(
                    f"{source}: {key}: stood at {shown(tuple(path))}, by another rank's metadata at {shown(known)}"
                )

    def _add_tensor(self, source: str, key: str, value: TensorStorageMetadata) -> None:
        try:
            shape, dtype = tuple(map(int, value.size)), value.properties.dtype
            if not isinstance(dtype, torch.dtype):
                raise TypeError(f"its dtype is a {type(dtype).__name__}")
        except MALFORMED as error:
            raise CatalogError(f"{source}: {key}: incomplete tensor metadata ({error})") from error
        if key in self._objects:
            raise CatalogError(f"{source}: {key}: saved as a tensor, by another rank's metadata as an object")
        row = self._rows[key]
        if row == len(self._shapes):
            if not is_possible(shape):
                raise CatalogError(f"{source}: {key}: no tensor has the shape {shown(shape)}; the metadata is damaged")
            self._shapes.append(shape)
            self._dtypes.append(dtype)
        known = self._dtypes[row], self._shapes[row]
        if known != (dtype, shape):
            raise CatalogError(
                f"{source}: {key}: saved as {dtype} of shape {shape}, elsewhere as {known[0]} of shape {known[1]}"
            )

    def _add_object(self, source: str, key: str, place: _Place | None) -> None:
        if key in self._rows:
            raise CatalogError(f"{source}: {key}: saved as an object, by another rank's metadata as a tensor")
        if place is not None:
            self._objects.setdefault(key, place)  # another rank's copy: one is enough
        elif key not in self._objects:
            self._problems.append(f"{key}: no file holds it")

    def _chunk_columns(
        self,
        source: str,
        tensors: Mapping[str, TensorStorageMetadata],
        numbers: Sequence[int],
        items: ItemColumns,
        objects: Mapping[int, int],
    ) -> ChunkColumns:
        """The chunks of some tensors of one metadata file, and where they are: in ``objects`` are the items without a box."""
        rows = np.array([self._rows[key] for key in tensors], dtype=np.int64)
        shapes = Shapes([self._shapes[row] for row in rows.tolist()])
        counts, offsets, sizes = _boxes(source, tensors)
        tensor = np.repeat(np.arange(len(tensors)), counts)  # of each chunk, an index into `tensors`
        is_inside = shapes.contain(tensor, offsets) & shapes.contain(tensor, sizes)
        if is_inside.all():
            ends = RaggedArray(offsets.flat + sizes.flat, offsets.lengths)
            is_inside = shapes.contain(tensor, ends)
        for chunk in np.flatnonzero(~is_inside).tolist():
            key, shape = list(tensors)[tensor[chunk]], self._shapes[rows[tensor[chunk]]]
            box = f"at {offsets.row(chunk)} of sizes {sizes.row(chunk)}"
            raise CatalogError(f"{source}: {key}: chunk {box} is outside the shape {shape}")
        first = shapes.numbers(tensor, offsets)
        item = items.rows_of(np.array(numbers, dtype=np.int64), shapes, tensor=tensor, first=first)
        for chunk in np.flatnonzero((item == NO_ITEM) & (counts[tensor] == 1)).tolist():
            item[chunk] = objects.get(numbers[tensor[chunk]], NO_ITEM)
        places = np.append(items.place, np.array([(NO_FILE, 0, 0, 0)], PLACE))  # the last one is that of NO_ITEM
        last = shapes.numbers(tensor, ends)
        return ChunkColumns(rows[tensor], first, last, offsets=offsets, sizes=sizes, place=places[item])

    def finish(self) -> Catalog:
        """The catalog of all files that were added. Raises UnsafeMetadata."""
        keys = list(self._rows)
        chunks = ChunkColumns.concatenate(self._chunks).without_replicas()
        chunk_file = self._chunk_files(keys, chunks)
        for chunk in np.flatnonzero(chunk_file == NO_FILE).tolist():
            box = Region(chunks.offsets.row(chunk), chunks.sizes.row(chunk))
            self._problems.append(f"{keys[chunks.tensor[chunk]]}: no file holds the chunk {box}")
        paths, formats = list(self._paths), tuple(self._formats)
        objects = {}
        for key, place in self._objects.items():
            path, byte_offset, byte_length, item_format = place
            file = self._file(key, paths[path])
            objects[key] = SavedObject(key, file, byte_offset, byte_length, formats[item_format])
        counts = np.bincount(chunks.tensor, minlength=len(keys)).tolist()
        return Catalog(
            location=self._location,
            torch_metadata_version=", ".join(sorted(self._versions)),
            files=tuple(self._files),
            tensors=saved_tensors(keys, self._shapes, self._dtypes, counts),
            objects=objects,
            paths=self._key_paths,
            chunk_file=chunk_file,
            chunk_byte_offset=chunks.place["byte_offset"].copy(),
            chunk_byte_length=chunks.place["byte_length"].copy(),
            box_offsets=chunks.offsets.flat,
            box_sizes=chunks.sizes.flat,
            chunk_format=chunks.place["format"].copy(),
            formats=formats,
            problems=tuple(self._problems),
        )

    def _chunk_files(self, keys: Sequence[str], chunks: ChunkColumns) -> np.ndarray:
        """The file of each chunk, ``int32``. Files are numbered in the order in which chunks name them."""
        paths, path = list(self._paths), chunks.place["path"]
        file_of = np.full(len(paths) + 1, NO_FILE, dtype=np.int32)  # the last entry is for NO_FILE
        used, first = np.unique(path, return_index=True)
        for chunk in np.sort(first[used != NO_FILE]).tolist():
            file_of[path[chunk]] = self._file(keys[chunks.tensor[chunk]], paths[path[chunk]])
        chunk_file: np.ndarray = file_of[path]
        return chunk_file

    def _file(self, key: str, relative_path: str) -> int:
        """The number of a file that holds something of a key. Raises UnsafeMetadata if it is outside the checkpoint."""
        name = name_inside(relative_path)
        if name is None:
            raise UnsafeMetadata(
                f"{key}: relative_path {relative_path!r} leaves the checkpoint {self._location}; refused. "
                "A checkpoint's files are inside its directory."
            )
        return self._files[name]


def _boxes(source: str, tensors: Mapping[str, TensorStorageMetadata]) -> tuple[np.ndarray, RaggedArray, RaggedArray]:
    """The number of chunks of each tensor, and the offsets and sizes of all chunks."""
    try:
        chunks = [list(tensor.chunks) for tensor in tensors.values()]
        boxes = states_of(list(chain.from_iterable(chunks)), ChunkStorageMetadata)
        counts = np.fromiter(map(len, chunks), np.int64, len(chunks))
        offsets = RaggedArray.from_rows([box["offsets"] for box in boxes])
        return counts, offsets, RaggedArray.from_rows([box["sizes"] for box in boxes])
    except MALFORMED as error:
        if len(tensors) > 1:
            for key, tensor in tensors.items():  # one by one, to name the one that is malformed
                _boxes(source, {key: tensor})
        raise CatalogError(f"{source}: {next(iter(tensors))}: incomplete tensor metadata ({error})") from error


def _check_key(source: str, key: Any) -> None:
    if not isinstance(key, str):
        raise CatalogError(
            f"{source}: the key {shown(key)} is a {type(key).__name__}, not a string; save with flatten_state_dict=True "
            "(torch's default), which makes strings of all keys"
        )
    try:
        key.encode()
    except UnicodeEncodeError:
        raise CatalogError(
            f"{source}: the key {key!r} is not text: it holds half of a character (a surrogate)"
        ) from None


def _flattened_by_megatron(metadata: Metadata) -> Iterator[str]:
    """Problems: tensors that Megatron-Core up to 0.14 saved as flat slices of blocks, which are not boxes of the parameter."""
    known = metadata.mcore_data if isinstance(metadata.mcore_data, dict) else {}
    for key, remarks in known.items():
        shape = remarks.get("nd_reformulated_orig_global_shape") if isinstance(remarks, dict) else None
        if shape is not None:
            yield (
                f"{key if isinstance(key, str) else shown(key)}: saved by Megatron-Core as flat slices of blocks (fully_sharded_model_space) of the shape "
                f"{shown(shape)}; that can't be loaded: save with --dist-ckpt-optim-fully-reshardable"
            )
