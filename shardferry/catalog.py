"""Turn a checkpoint's metadata into a catalog: every saved chunk's file, byte position, length, dtype and box.

The catalog is columnar (one NumPy array a property, one row a chunk): it is small, opens quickly, and travels between
processes without being rebuilt.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
import torch

from shardferry.collector import paused_gc
from shardferry.errors import CatalogError, UnsafeMetadata
from shardferry.item_format import ItemFormat, RawItem, TransformedItem, ZipItem
from shardferry.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from shardferry.region import Region

NO_FILE = -1  # in Catalog.chunk_file: the metadata lists the chunk, but not where it was stored

KeyPath = tuple[str | int, ...]  # where a key's value stood in the nested state dict that was saved


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """One tensor of the checkpoint; its chunks are the rows ``chunks`` of the catalog's columns."""

    key: str  # as in the metadata: "optim.state.layers.0.wq.weight.exp_avg"
    shape: tuple[int, ...]  # of the whole tensor, elements
    dtype: torch.dtype
    chunks: range
    boxes_start: int  # first entry of its first chunk in box_offsets and box_sizes; ndim entries a chunk

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class SavedObject:
    """One saved Python object (a hyperparameter, say): a whole item."""

    key: str
    file: int  # row of Catalog.files
    byte_offset: int
    byte_length: int
    format: ItemFormat


@dataclass(frozen=True)
class Catalog:
    """What a checkpoint holds."""

    location: str
    torch_metadata_version: str
    files: tuple[str, ...]  # relative to the location
    tensors: Mapping[str, SavedTensor]
    objects: Mapping[str, SavedObject]
    paths: Mapping[str, KeyPath] | None  # None: saved without flattening
    chunk_file: np.ndarray  # int32[num_chunks], row of files, or NO_FILE
    chunk_byte_offset: np.ndarray  # int64[num_chunks], of the item in its file
    chunk_byte_length: np.ndarray  # int64[num_chunks], of the item
    box_offsets: np.ndarray  # int64, elements
    box_sizes: np.ndarray  # int64, elements
    chunk_format: np.ndarray  # int16[num_chunks], row of formats
    formats: tuple[ItemFormat, ...]
    file_bytes: Mapping[str, int] = field(
        default_factory=dict
    )  # by name, as far as the storage told when it was opened
    file_versions: Mapping[str, str] = field(default_factory=dict)  # alike: an etag, a time; see RangeReader.versions
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)  # for fsspec; may hold credentials
    problems: tuple[str, ...] = field(default=())

    @property
    def num_chunks(self) -> int:
        return len(self.chunk_file)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, each element once, without the items' overhead."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def boxes(self, tensor: SavedTensor) -> tuple[np.ndarray, np.ndarray]:
        """Offsets and sizes of a tensor's chunks, each ``int64[num_chunks, ndim]``."""
        shape = (len(tensor.chunks), len(tensor.shape))
        rows = slice(tensor.boxes_start, tensor.boxes_start + math.prod(shape))
        return self.box_offsets[rows].reshape(shape), self.box_sizes[rows].reshape(shape)

    def region(self, tensor: SavedTensor, chunk: int) -> Region:
        """The box of one chunk (a row of the catalog) of a tensor."""
        offsets, sizes = self.boxes(tensor)
        row = chunk - tensor.chunks.start
        return Region(tuple(offsets[row].tolist()), tuple(sizes[row].tolist()))

    def path(self, key: str) -> KeyPath:
        """Where a key's value stood in the nested state dict; the key itself where that was not recorded."""
        return (self.paths or {}).get(key, (key,))


def build_catalog(
    parts: Mapping[str, Metadata],
    *,
    location: str,
    listing: Mapping[str, int | None] | None = None,
    versions: Mapping[str, str] | None = None,
) -> Catalog:
    """Build the catalog from the parsed metadata files of one checkpoint (one, or one a rank).

    Args:
        listing: bytes of the checkpoint's files, as far as known.
        versions: what will be different once a file is written again, as far as known.

    Raises:
        UnsafeMetadata: a file's relative path leaves the checkpoint.
        CatalogError: boxes or byte positions contradict each other.
    """
    builder = _CatalogBuilder(location)
    with paused_gc():
        for source, metadata in parts.items():
            builder.add(source, metadata)
        return builder.finish(listing or {}, versions or {})


class _CatalogBuilder:
    def __init__(self, location: str) -> None:
        self._location = location
        self._versions: set[str] = set()
        self._files: dict[str, int] = {}
        self._file_of: dict[str, int] = {}  # by relative path as the metadata writes it
        self._tensors: dict[str, _TensorRows] = {}
        self._objects: dict[str, SavedObject] = {}
        self._paths: dict[str, KeyPath] | None = None
        self._formats: dict[ItemFormat, int] = {_ZIP: 0}
        self._problems: list[str] = []

    def add(self, source: str, metadata: Metadata) -> None:
        storage = _storage_by_box(source, metadata)
        self._versions.add(str(metadata.version) if metadata.version else "unversioned")
        if metadata.planner_data is not None:
            self._add_paths(source, metadata.planner_data)
        for key, value in metadata.state_dict_metadata.items():
            if not isinstance(key, str):
                raise CatalogError(
                    f"{source}: the key {key!r} is a {type(key).__name__}, not a string; save with flatten_state_dict=True "
                    "(torch's default), which makes strings of all keys"
                )
            if not key.isprintable() and _is_no_text(key):
                raise CatalogError(f"{source}: the key {key!r} is no text: it holds half of a character (a surrogate)")
            if isinstance(value, TensorStorageMetadata):
                self._add_tensor(source, key, value, storage)
            elif isinstance(value, BytesStorageMetadata):
                self._add_object(source, key, storage)
            else:
                raise CatalogError(f"{source}: {key}: is a {type(value).__name__}, neither tensor nor bytes")
        self._problems += _flattened_by_megatron(metadata)

    def _add_paths(self, source: str, paths: Any) -> None:
        if not isinstance(paths, dict):
            self._problems.append(
                f"{source}: planner_data is a {type(paths).__name__}; key paths are taken from the keys"
            )
            return
        self._paths = {} if self._paths is None else self._paths
        for key, value in paths.items():
            path = _key_path(source, key, value)
            if self._paths.setdefault(key, path) != path:
                raise CatalogError(
                    f"{source}: {key}: stood at {path}, by another rank's metadata at {self._paths[key]}"
                )

    def _add_object(self, source: str, key: str, storage: _Storage) -> None:
        if key in self._tensors:
            raise CatalogError(f"{source}: {key}: saved as an object, by another rank's metadata as a tensor")
        if key in self._objects:  # another rank's copy: one is enough
            return
        item = storage.get((key, None))
        if item is None:
            self._problems.append(f"{key}: no file holds it")
            return
        file = self._file(key, item.relative_path)
        self._objects[key] = SavedObject(key, file, item.offset, item.length, item.format)

    def _add_tensor(self, source: str, key: str, value: TensorStorageMetadata, storage: _Storage) -> None:
        try:
            shape, dtype = tuple(map(int, value.size)), value.properties.dtype
            boxes = [(tuple(map(int, c.offsets)), tuple(map(int, c.sizes))) for c in value.chunks]
        except (AttributeError, TypeError, ValueError) as error:
            raise CatalogError(f"{source}: {key}: incomplete tensor metadata ({error})") from error
        rows = self._tensors.setdefault(key, _TensorRows(shape, dtype))
        if (rows.shape, rows.dtype) != (shape, dtype):
            raise CatalogError(
                f"{source}: {key}: saved as {dtype} of shape {shape}, elsewhere as {rows.dtype} of shape {rows.shape}"
            )
        if key in self._objects:
            raise CatalogError(f"{source}: {key}: saved as a tensor, by another rank's metadata as an object")
        for offsets, sizes in boxes:
            _check_box(source, key, shape, offsets, sizes)
            if not rows.lacks((offsets, sizes)):  # a replica
                continue
            item = storage.get((key, offsets)) or (storage.get((key, None)) if len(boxes) == 1 else None)
            rows.stored[offsets, sizes] = _NOT_STORED if item is None else self._stored(key, item)

    def _stored(self, key: str, item: _Item) -> _Stored:
        return _Stored(self._file(key, item.relative_path), item.offset, item.length, self._format(item.format))

    def _format(self, item_format: ItemFormat) -> int:
        return self._formats.setdefault(item_format, len(self._formats))

    def _file(self, key: str, relative_path: str) -> int:
        file = self._file_of.get(relative_path)
        if file is None:
            file = self._file_of[relative_path] = self._add_file(key, relative_path)
        return file

    def _add_file(self, key: str, relative_path: str) -> int:
        path = PurePosixPath(relative_path)
        outside = (
            path.is_absolute() or ".." in path.parts or PureWindowsPath(relative_path).drive or "\0" in relative_path
        )
        if outside or not path.parts:
            raise UnsafeMetadata(
                f"{key}: relative_path {relative_path!r} leaves the checkpoint {self._location}; refused. "
                "A checkpoint's files lie inside its directory."
            )
        return self._files.setdefault(str(path), len(self._files))

    def finish(self, listing: Mapping[str, int | None], versions: Mapping[str, str]) -> Catalog:
        tensors: dict[str, SavedTensor] = {}
        columns = _Columns()
        for key, rows in self._tensors.items():
            start = len(columns.files)
            chunks = range(start, start + len(rows.stored))
            tensors[key] = SavedTensor(key, rows.shape, rows.dtype, chunks, len(columns.offsets))
            for box, stored in rows.stored.items():
                columns.add(box, stored)
                if stored is _NOT_STORED:
                    self._problems.append(f"{key}: no file holds the chunk {Region(*box)}")
        return Catalog(
            location=self._location,
            torch_metadata_version=", ".join(sorted(self._versions)),
            files=tuple(self._files),
            tensors=tensors,
            objects=self._objects,
            paths=self._paths,
            chunk_file=np.array(columns.files, dtype=np.int32),
            chunk_byte_offset=np.array(columns.byte_offsets, dtype=np.int64),
            chunk_byte_length=np.array(columns.byte_lengths, dtype=np.int64),
            box_offsets=np.array(columns.offsets, dtype=np.int64),
            box_sizes=np.array(columns.sizes, dtype=np.int64),
            chunk_format=np.array(columns.formats, dtype=np.int16),
            formats=tuple(self._formats),
            file_bytes={file: size for file in self._files if (size := listing.get(file)) is not None},
            file_versions={file: versions[file] for file in self._files if file in versions},
            problems=tuple(self._problems),
        )


_Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes, elements


class _Stored(NamedTuple):
    """Where a chunk is: the row of a file, bytes, the row of a format."""

    file: int
    byte_offset: int
    byte_length: int
    format: int


_NOT_STORED = _Stored(NO_FILE, 0, 0, 0)


class _TensorRows:
    """The chunks of one tensor by their boxes. Equal boxes are replicas: the first that is stored counts."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape = shape
        self.dtype = dtype
        self.stored: dict[_Box, _Stored] = {}

    def lacks(self, box: _Box) -> bool:
        return self.stored.get(box, _NOT_STORED) is _NOT_STORED


class _Columns:
    """The columns of the chunks of all tensors."""

    def __init__(self) -> None:
        self.files: list[int] = []
        self.byte_offsets: list[int] = []
        self.byte_lengths: list[int] = []
        self.formats: list[int] = []
        self.offsets: list[int] = []
        self.sizes: list[int] = []

    def add(self, box: _Box, stored: _Stored) -> None:
        self.files.append(stored.file)
        self.byte_offsets.append(stored.byte_offset)
        self.byte_lengths.append(stored.byte_length)
        self.formats.append(stored.format)
        self.offsets += box[0]
        self.sizes += box[1]


class _Item(NamedTuple):
    relative_path: str
    offset: int  # bytes
    length: int  # bytes
    format: ItemFormat


_ZIP, _RAW = ZipItem(), RawItem()  # one for all: there may be a million items

_Storage = dict[tuple[str, tuple[int, ...] | None], _Item]


def _storage_by_box(source: str, metadata: Metadata) -> _Storage:
    if not isinstance(metadata.storage_data, dict):
        raise CatalogError(f"{source}: holds no table of stored items; it was not written by a file-system writer")
    return dict(_items(source, metadata.storage_data))


def _items(source: str, storage_data: dict[Any, Any]) -> Iterator[tuple[tuple[str, tuple[int, ...] | None], _Item]]:
    for index, info in storage_data.items():
        if not isinstance(index, MetadataIndex):
            raise CatalogError(f"{source}: the storage table is keyed by {type(index).__name__}, not MetadataIndex")
        try:
            item = _Item(str(info.relative_path), int(info.offset), int(info.length), _format_of(info))
            key = (index.fqn, None if index.offset is None else tuple(index.offset))
        except (AttributeError, TypeError, ValueError) as error:
            raise CatalogError(f"{source}: an incomplete entry in the storage table ({error})") from error
        if item.offset < 0 or item.length < 0:
            raise CatalogError(f"{source}: {key[0]}: item at byte {item.offset} with {item.length} bytes")
        yield key, item


def _is_no_text(key: str) -> bool:
    try:
        key.encode()
    except UnicodeEncodeError:
        return True
    return False


def _key_path(source: str, key: Any, path: Any) -> KeyPath:
    whole = isinstance(path, tuple | list) and path and all(type(part) in (str, int) for part in path)
    if not isinstance(key, str) or not whole:
        raise CatalogError(
            f"{source}: planner_data has the path {path!r} for the key {key!r}, which torch's planners don't write: paths are "
            "tuples of strings and integers, by key; set planner_data to None, and paths are taken from the keys"
        )
    return tuple(path)


def _flattened_by_megatron(metadata: Metadata) -> Iterator[str]:
    """Tensors that Megatron-Core up to 0.14 saved as flat slices of blocks, which are no boxes of the parameter."""
    known = metadata.mcore_data if isinstance(metadata.mcore_data, dict) else {}
    for key, remarks in known.items():
        shape = remarks.get("nd_reformulated_orig_global_shape") if isinstance(remarks, dict) else None
        if shape is not None:
            yield (
                f"{key}: saved by Megatron-Core as flat slices of blocks (fully_sharded_model_space) of the shape "
                f"{tuple(shape)}; that can't be loaded: save with --dist-ckpt-optim-fully-reshardable"
            )


def _format_of(info: Any) -> ItemFormat:
    """Raises TypeError where the descriptors are no list."""
    if info.is_raw:
        return _RAW
    return TransformedItem(tuple(map(str, info.transform_descriptors))) if info.transform_descriptors else _ZIP


def _check_box(source: str, key: str, shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    fits = len(offsets) == len(sizes) == len(shape)
    for offset, size, length in zip(offsets, sizes, shape, strict=False):
        if offset < 0 or size < 0 or offset + size > length:
            fits = False
    if not fits:
        raise CatalogError(f"{source}: {key}: chunk at {offsets} of sizes {sizes} lies outside the shape {shape}")
