"""Turn the parsed metadata of a checkpoint into its catalog, column by column.

A million chunks never become a million objects of ours. Each property of the unpickled values is read once into a column. NumPy
then finds which item holds which chunk, and which boxes are replicas.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
import torch

from shardferry.checkpoint.catalog import NO_FILE, Catalog, SavedObject, SavedTensor
from shardferry.checkpoint.columns import (
    MALFORMED,
    NO_ITEM,
    ChunkColumns,
    ItemColumns,
    NameTable,
    RaggedArray,
    Shapes,
    is_possible,
)
from shardferry.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from shardferry.errors import CatalogError, UnsafeMetadata
from shardferry.region import Region
from shardferry.state_dicts import KeyPath

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
    """The tensors, by key, whose chunks are stored one tensor after another in the catalog's columns.

    Args:
        keys, shapes, dtypes: of each tensor; shapes in elements.
        counts: number of chunks of each tensor.
    """
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


class _StoredObject(NamedTuple):
    path: int  # number in NameTable
    byte_offset: int
    byte_length: int
    format: int  # number in NameTable


class _KeyedTensor(NamedTuple):
    """A tensor of one metadata file."""

    number: int  # of its key in this file
    key: str
    metadata: TensorStorageMetadata
    row: int  # of the builder's tensors


class _CatalogBuilder:
    def __init__(self, location: str) -> None:
        self._location = location
        self._versions: set[str] = set()
        self._tensors: dict[str, int] = {}  # key: row of the next two lists
        self._shapes: list[tuple[int, ...]] = []
        self._dtypes: list[torch.dtype] = []
        self._chunks: list[ChunkColumns] = []
        self._objects: dict[str, _StoredObject] = {}
        self._paths: dict[str, KeyPath] | None = None
        self._names = NameTable()
        self._problems: list[str] = []

    def add(self, source: str, metadata: Metadata) -> None:
        """Add the tensors, objects and items of one metadata file, whose content is used up. Raises CatalogError."""
        items = ItemColumns.take_from(source, metadata, self._names)
        self._versions.add(str(metadata.version) if metadata.version else "unversioned")
        if metadata.planner_data is not None:
            self._add_paths(source, metadata.planner_data)
        objects = items.objects()
        tensors: list[_KeyedTensor] = []
        for number, (key, value) in enumerate(metadata.state_dict_metadata.items()):
            _check_key(source, key)
            if isinstance(value, TensorStorageMetadata):
                tensors.append(_KeyedTensor(number, key, value, self._add_tensor(source, key, value)))
            elif isinstance(value, BytesStorageMetadata):
                self._add_object(source, key, items, objects.get(number, NO_ITEM))
            else:
                raise CatalogError(f"{source}: {key}: is a {type(value).__name__}, neither tensor nor bytes")
        self._chunks.append(self._chunk_columns(source, tensors, items, objects))
        self._problems += _flattened_by_megatron(metadata)

    def _add_paths(self, source: str, paths: Any) -> None:
        if not isinstance(paths, dict):
            name = source.rpartition("/")[2]  # without the location: a checkpoint can be moved
            self._problems.append(
                f"{name}: planner_data is a {type(paths).__name__}; key paths are taken from the keys"
            )
            return
        self._paths = {} if self._paths is None else self._paths
        for key, value in paths.items():
            path = _key_path(source, key, value)
            if self._paths.setdefault(key, path) != path:
                raise CatalogError(
                    f"{source}: {key}: stood at {path}, by another rank's metadata at {self._paths[key]}"
                )

    def _add_tensor(self, source: str, key: str, value: TensorStorageMetadata) -> int:
        """The tensor's row."""
        try:
            shape, dtype = tuple(map(int, value.size)), value.properties.dtype
        except MALFORMED as error:
            raise CatalogError(f"{source}: {key}: incomplete tensor metadata ({error})") from error
        row = self._tensors.setdefault(key, len(self._shapes))
        if row == len(self._shapes):
            if not is_possible(shape):
                raise CatalogError(f"{source}: {key}: no tensor has the shape {shape}; the metadata is damaged")
            self._shapes.append(shape)
            self._dtypes.append(dtype)
        known = self._dtypes[row], self._shapes[row]
        if known != (dtype, shape):
            raise CatalogError(
                f"{source}: {key}: saved as {dtype} of shape {shape}, elsewhere as {known[0]} of shape {known[1]}"
            )
        if key in self._objects:
            raise CatalogError(f"{source}: {key}: saved as a tensor, by another rank's metadata as an object")
        return row

    def _add_object(self, source: str, key: str, items: ItemColumns, item: int) -> None:
        if key in self._tensors:
            raise CatalogError(f"{source}: {key}: saved as an object, by another rank's metadata as a tensor")
        if key in self._objects:  # another rank's copy: one is enough
            return
        if item == NO_ITEM:
            self._problems.append(f"{key}: no file holds it")
            return
        place = (int(column[item]) for column in (items.path, items.byte_offset, items.byte_length, items.format))
        self._objects[key] = _StoredObject(*place)

    def _chunk_columns(
        self, source: str, tensors: Sequence[_KeyedTensor], items: ItemColumns, objects: Mapping[int, int]
    ) -> ChunkColumns:
        """The chunks of some tensors of one metadata file, and the items that hold them.

        Args:
            objects: rows of ``items`` without a box, by the number of their key.
        """
        shapes = Shapes([self._shapes[tensor.row] for tensor in tensors])
        numbers = np.array([tensor.number for tensor in tensors], dtype=np.int64)
        rows = np.array([tensor.row for tensor in tensors], dtype=np.int64)
        counts, offsets, sizes = _boxes(source, tensors)
        tensor = np.repeat(np.arange(len(tensors)), counts)  # of each chunk, an index into `tensors`
        if len(outside := np.flatnonzero(~shapes.contain(tensor, offsets, sizes))):
            first = int(outside[0])
            raise _outside(source, tensors[tensor[first]], offsets.row(first), sizes.row(first))
        corner = shapes.corners(tensor, offsets)
        item = items.rows_of(numbers, shapes, tensor=tensor, corner=corner)
        for chunk in np.flatnonzero((item == NO_ITEM) & (counts[tensor] == 1)).tolist():
            item[chunk] = objects.get(tensors[tensor[chunk]].number, NO_ITEM)
        return ChunkColumns(
            tensor=rows[tensor],
            corner=corner,
            end=shapes.corners(tensor, RaggedArray(offsets.flat + sizes.flat, offsets.lengths)),
            offsets=offsets,
            sizes=sizes,
            path=_take_or(NO_FILE, items.path, item),
            byte_offset=_take_or(0, items.byte_offset, item),
            byte_length=_take_or(0, items.byte_length, item),
            format=_take_or(0, items.format, item),
        )

    def finish(self) -> Catalog:
        """The catalog of all files that were added. Raises UnsafeMetadata."""
        keys = list(self._tensors)
        chunks = ChunkColumns.concatenate(self._chunks).without_replicas()
        files = _Files(self._location)
        chunk_file = self._chunk_files(keys, chunks, files)
        for chunk in np.flatnonzero(chunk_file == NO_FILE).tolist():
            box = Region(chunks.offsets.row(chunk), chunks.sizes.row(chunk))
            self._problems.append(f"{keys[chunks.tensor[chunk]]}: no file holds the chunk {box}")
        objects = self._saved_objects(files)
        counts = np.bincount(chunks.tensor, minlength=len(keys)).tolist()
        return Catalog(
            location=self._location,
            torch_metadata_version=", ".join(sorted(self._versions)),
            files=tuple(files.names),
            tensors=saved_tensors(keys, self._shapes, self._dtypes, counts),
            objects=objects,
            paths=self._paths,
            chunk_file=chunk_file,
            chunk_byte_offset=chunks.byte_offset,
            chunk_byte_length=chunks.byte_length,
            box_offsets=chunks.offsets.flat,
            box_sizes=chunks.sizes.flat,
            chunk_format=chunks.format,
            formats=tuple(self._names.formats),
            problems=tuple(self._problems),
        )

    def _chunk_files(self, keys: Sequence[str], chunks: ChunkColumns, files: _Files) -> np.ndarray:
        """The file of each chunk, ``int32``. Files are numbered in the order in which chunks name them."""
        paths = self._names.paths
        file_of = np.full(len(paths) + 1, NO_FILE, dtype=np.int32)  # the last entry is for NO_FILE
        used, first = np.unique(chunks.path, return_index=True)
        for chunk in np.sort(first[used != NO_FILE]).tolist():
            path = chunks.path[chunk]
            file_of[path] = files.number(keys[chunks.tensor[chunk]], paths[path])
        chunk_file: np.ndarray = file_of[chunks.path]
        return chunk_file

    def _saved_objects(self, files: _Files) -> dict[str, SavedObject]:
        paths, formats = self._names.paths, self._names.formats
        return {
            key: SavedObject(
                key, files.number(key, paths[item.path]), item.byte_offset, item.byte_length, formats[item.format]
            )
            for key, item in self._objects.items()
        }


class _Files:
    """The files that hold items, by number. Each is inside the checkpoint."""

    def __init__(self, location: str) -> None:
        self.names: dict[str, int] = {}
        self._location = location

    def number(self, key: str, relative_path: str) -> int:
        """The number of a path. Raises UnsafeMetadata if it leads out of the checkpoint."""
        name = name_inside(relative_path)
        if name is None:
            raise UnsafeMetadata(
                f"{key}: relative_path {relative_path!r} leaves the checkpoint {self._location}; refused. "
                "A checkpoint's files are inside its directory."
            )
        return self.names.setdefault(name, len(self.names))


def _boxes(source: str, tensors: Sequence[_KeyedTensor]) -> tuple[np.ndarray, RaggedArray, RaggedArray]:
    """The number of chunks of each tensor, and the offsets and sizes of all chunks."""
    try:
        chunks = [list(tensor.metadata.chunks) for tensor in tensors]
        boxes = _states(list(chain.from_iterable(chunks)))
        counts = np.fromiter(map(len, chunks), np.int64, len(chunks))
        offsets = RaggedArray.from_rows([box["offsets"] for box in boxes])
        return counts, offsets, RaggedArray.from_rows([box["sizes"] for box in boxes])
    except MALFORMED as error:
        if len(tensors) > 1:
            for tensor in tensors:  # one by one, to name the one that is malformed
                _boxes(source, [tensor])
        raise CatalogError(f"{source}: {tensors[0].key}: incomplete tensor metadata ({error})") from error


def _states(chunks: Sequence[ChunkStorageMetadata]) -> list[dict[str, Any]]:
    for kind in set(map(type, chunks)) - {ChunkStorageMetadata}:
        raise TypeError(f"a chunk is a {kind.__name__}")
    return [chunk[0] for chunk in chunks]


def _take_or(missing: int, column: np.ndarray, item: np.ndarray) -> np.ndarray:
    """The rows ``item`` of a column; ``missing`` where ``item`` is NO_ITEM."""
    taken: np.ndarray = np.append(column, np.array(missing, dtype=column.dtype))[item]
    return taken


def _check_key(source: str, key: Any) -> None:
    if not isinstance(key, str):
        raise CatalogError(
            f"{source}: the key {key!r} is a {type(key).__name__}, not a string; save with flatten_state_dict=True "
            "(torch's default), which makes strings of all keys"
        )
    if not key.isprintable() and not _is_text(key):
        raise CatalogError(f"{source}: the key {key!r} is not text: it holds half of a character (a surrogate)")


def _is_text(key: str) -> bool:
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return True


def _outside(source: str, tensor: _KeyedTensor, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> CatalogError:
    shape = tuple(map(int, tensor.metadata.size))
    return CatalogError(f"{source}: {tensor.key}: chunk at {offsets} of sizes {sizes} is outside the shape {shape}")


def _key_path(source: str, key: Any, path: Any) -> KeyPath:
    is_path = isinstance(path, tuple | list) and path and _PATH_PARTS.issuperset(map(type, path))
    if not isinstance(key, str) or not is_path:
        raise CatalogError(
            f"{source}: planner_data has the path {path!r} for the key {key!r}, which torch's planners don't write: paths are "
            "tuples of strings and integers, by key; set planner_data to None, and paths are taken from the keys"
        )
    return tuple(path)


def _flattened_by_megatron(metadata: Metadata) -> Iterator[str]:
    """Problems: tensors that Megatron-Core up to 0.14 saved as flat slices of blocks, which are not boxes of the parameter."""
    known = metadata.mcore_data if isinstance(metadata.mcore_data, dict) else {}
    for key, remarks in known.items():
        shape = remarks.get("nd_reformulated_orig_global_shape") if isinstance(remarks, dict) else None
        if shape is not None:
            yield (
                f"{key}: saved by Megatron-Core as flat slices of blocks (fully_sharded_model_space) of the shape "
                f"{tuple(shape)}; that can't be loaded: save with --dist-ckpt-optim-fully-reshardable"
            )
