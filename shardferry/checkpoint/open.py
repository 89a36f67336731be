"""Open a checkpoint: read its metadata once, safely, into a catalog. The formats of metadata are tried in order."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, suppress
from pathlib import Path
from typing import Any

import numpy as np

from shardferry._gc import paused_gc
from shardferry.checkpoint.build import build_catalog
from shardferry.checkpoint.cache import CatalogCache
from shardferry.checkpoint.catalog import Catalog
from shardferry.checkpoint.joined import join_catalogs
from shardferry.checkpoint.kept import open_kept
from shardferry.checkpoint.megatron import COMMON_FILE, with_common_values
from shardferry.checkpoint.metadata import parse_metadata
from shardferry.checkpoint.safetensors import INDEX_FILE, SINGLE_FILE, open_safetensors, with_safetensors_positions
from shardferry.checkpoint.stale import stale_metadata, stale_warning
from shardferry.errors import CatalogError, CheckpointNotFound, MissingFile
from shardferry.storage.base import RangeReader, read_file
from shardferry.storage.joined import JoinedReader
from shardferry.storage.open import Location, open_storage
from shardferry.storage.retry import RetryPolicy

logger = logging.getLogger(__name__)

CacheDirectory = str | os.PathLike[str] | None  # None: no catalog is kept

METADATA_FILE = ".metadata"
_RANK_METADATA = re.compile(r"__(\d+)\.metadata")  # one per rank, where the save used no collectives
_KNOWN_NAMES = (METADATA_FILE, COMMON_FILE, INDEX_FILE, SINGLE_FILE)  # of a storage that can't list its files
_PIECE_BYTES = 16 * 1024 * 1024  # of a metadata file, read in one request
_PIECES_AT_ONCE = 8
_NAMED_NEAR = 3  # of the checkpoints beside a directory that is none


def open_checkpoint(
    location: Location, *, storage_options: Mapping[str, Any] | None = None, cache: CacheDirectory = None
) -> Catalog:
    """Open the checkpoint at a location.

    Args:
        location: a directory, its ``file://`` URL, or the URL of an object store (``s3://bucket/run/step-1000``), of a web
            server, or of anything else that fsspec can open; or a ``ray.train.Checkpoint``.
        storage_options: credentials, an endpoint, ... (docs/storage.md). They go with the catalog, to every process that
            reads.
        cache: a directory that keeps catalogs by the digest of their metadata (docs/scale.md). Default: no catalog is kept.

    Raises:
        CheckpointNotFound: there is no such directory, or the save was never completed (no ``.metadata``).
        UnsafeMetadata: the metadata names a forbidden global, or a file outside the checkpoint.
        CatalogError: the metadata is damaged.
        StorageError: a request failed.
    """
    with closing(open_storage(location, storage_options)) as storage:
        return read_catalog(storage, cache=cache)


def opened_storage(catalog: Catalog, *, retry: RetryPolicy | None = None) -> AbstractContextManager[RangeReader]:
    """Open a catalog's storage as `storage_of` does, and close it at the end of the ``with``."""
    return closing(storage_of(catalog, retry=retry))


def storage_of(catalog: Catalog, *, retry: RetryPolicy | None = None) -> RangeReader:
    """Open the storage of a catalog. Reading a file that was written again since the catalog was read is an error.

    Args:
        retry: as for `open_storage`.

    Raises:
        CheckpointNotFound: the directory is gone.
    """
    storage = open_storage(catalog.location, catalog.storage_options, retry=retry)
    storage.expect(catalog.file_versions)
    return storage


@paused_gc()
def read_catalog(storage: RangeReader, *, cache: CacheDirectory = None) -> Catalog:
    """The catalog of an open storage.

    Args:
        cache: as for `open_checkpoint`.

    Raises:
        CheckpointNotFound, UnsafeMetadata, CatalogError, StorageError: as for `open_checkpoint`.
    """
    if isinstance(storage, JoinedReader):
        weights = read_catalog(storage.weights, cache=cache)
        both = join_catalogs(read_catalog(storage.first, cache=cache), weights)
        return dataclasses.replace(both, storage_options=storage.options)
    listing = storage.listing() if storage.traits.has_listing else _known_files(storage)
    versions = storage.versions()
    names, kept = list(listing), None if cache is None else CatalogCache(Path(cache).expanduser())
    found = (catalog for read in _FORMATS if (catalog := read(storage, names, kept)) is not None)
    if (catalog := next(found, None)) is None:
        raise _no_checkpoint(storage, names)
    catalog = dataclasses.replace(
        catalog,
        stale=_stale(catalog, storage.times(), listing),
        file_bytes={file: size for file in catalog.files if (size := listing.get(file)) is not None},
        file_versions={file: versions[file] for file in catalog.files if file in versions},
        storage_options=storage.options,
    )
    if COMMON_FILE in listing:
        return with_common_values(catalog, read_file(storage, COMMON_FILE))
    return catalog


def _stale(catalog: Catalog, times: Mapping[str, float], sizes: Mapping[str, int | None]) -> str:
    """A warning where data files may be of a later save than the metadata, which is logged too; else empty."""
    if METADATA_FILE not in times:
        return ""
    data = {file: times[file] for file in catalog.files if file in times}
    largest = max((sizes.get(file) or 0 for file in data), default=0)
    found = stale_metadata(times[METADATA_FILE], data, largest_file_bytes=largest)
    if found is None:
        return ""
    warning = stale_warning(catalog.location, METADATA_FILE, len(data), found)
    logger.warning("%s", warning)
    return warning


# Reads the metadata of one format: storage, names of its files, cache -> catalog; None if the files have another format.
MetadataReader = Callable[[RangeReader, Sequence[str], CatalogCache | None], Catalog | None]


def _read_dcp(storage: RangeReader, names: Sequence[str], cache: CatalogCache | None) -> Catalog | None:
    """``.metadata``, which the coordinator of a save writes."""
    return _read_pickles(storage, [METADATA_FILE], cache) if METADATA_FILE in names else None


def _read_rank_metadata(storage: RangeReader, names: Sequence[str], cache: CatalogCache | None) -> Catalog | None:
    """``__0.metadata``, ``__1.metadata``, ...: each rank of a save without collectives writes its own.

    Nothing tells how many ranks there were, so only gaps can be found.
    """
    files = {int(found[1]): name for name in names if (found := _RANK_METADATA.fullmatch(name))}
    if not files:
        return None
    last = max(files)
    if lost := sorted(set(range(last)) - set(files)):
        raise CatalogError(
            f"{storage.location}: {len(files)} ranks wrote metadata of their own, up to {files[last]}, but that of rank "
            f"{lost[0]} is missing ({len(lost)} of {last + 1} are); without it its share can't be found. Copy all of the "
            "checkpoint, or use another one"
        )
    return _read_pickles(storage, [files[rank] for rank in sorted(files)], cache)


_FORMATS: tuple[MetadataReader, ...] = (
    _read_dcp,
    _read_rank_metadata,
    lambda storage, names, _cache: open_kept(storage, names),
    lambda storage, names, _cache: open_safetensors(storage, names),
)


def _read_pickles(storage: RangeReader, names: Sequence[str], cache: CatalogCache | None) -> Catalog:
    """The catalog of some pickles of DCP. Only what follows from these files alone is cached."""
    location, contents = storage.location, _contents(storage, names)
    digest = b"" if cache is None else _digest(contents)
    catalog = None if cache is None else cache.get(digest, location=location)
    if catalog is None:
        sources = ((f"{location}/{name}", content) for name, content in contents.items())
        parts = ((source, parse_metadata(content, source=source)) for source, content in sources)
        catalog = build_catalog(parts, location=location)
        if cache is not None:
            cache.put(digest, catalog)
    return with_safetensors_positions(catalog, storage)


def _contents(storage: RangeReader, names: Sequence[str]) -> dict[str, memoryview]:
    """Read some files, in several requests at once. Raises StorageError where a file is missing or short."""
    contents = {name: np.empty(storage.size(name), dtype=np.uint8).data for name in names}
    pieces = [
        (name, start, content[start : start + _PIECE_BYTES])
        for name, content in contents.items()
        for start in range(0, len(content), _PIECE_BYTES)
    ]
    with ThreadPoolExecutor(_PIECES_AT_ONCE, thread_name_prefix="shardferry-metadata") as pool:
        list(pool.map(lambda piece: storage.read_into(*piece), pieces))
    return contents


def _digest(contents: Mapping[str, memoryview]) -> bytes:
    """SHA-256 of all names and contents."""
    whole = hashlib.sha256()
    for name, content in contents.items():
        whole.update(f"{name!a} {len(content)} ".encode())
        whole.update(content)
    return whole.digest()


def _known_files(storage: RangeReader) -> dict[str, int | None]:
    """Size in bytes of the files of a storage that can't list them, by name: of those that a checkpoint begins with."""

    def size_of(name: str) -> int | None:
        with suppress(MissingFile):
            return storage.size(name)
        return None

    with ThreadPoolExecutor(len(_KNOWN_NAMES), thread_name_prefix="shardferry-open") as pool:
        found = zip(_KNOWN_NAMES, pool.map(size_of, _KNOWN_NAMES), strict=True)
        return {name: size for name, size in found if size is not None}


def _no_checkpoint(storage: RangeReader, names: Sequence[str]) -> CheckpointNotFound:
    if not storage.traits.has_listing:
        return CheckpointNotFound(
            f"{storage.location}: no {METADATA_FILE} file, and no {INDEX_FILE}. Other files can't be found here, as a web server "
            "doesn't list what it has: neither metadata that each rank wrote for itself (__0.metadata, ...) nor whether the save "
            'was completed. Where the server has an index page of the directory, storage_options={"client": "fsspec"} reads that'
        )
    saved = sum(name.endswith(".distcp") for name in names)
    hint = "the save was not completed" if saved else "this is not a distributed checkpoint"
    if near := _checkpoints_near(Path(storage.location)):
        rest = f" and {len(near) - _NAMED_NEAR} more" if len(near) > _NAMED_NEAR else ""
        hint += f". There is one in {', '.join(near[-_NAMED_NEAR:])}{rest}"
    return CheckpointNotFound(
        f"{storage.location}: no {METADATA_FILE} file among {len(names)} files ({saved} of them .distcp): {hint}"
    )


def _checkpoints_near(directory: Path) -> list[str]:
    """Directories just below a local one, and the one above it, that hold a checkpoint; the newest last."""
    metadata = [*directory.glob(f"*/{METADATA_FILE}"), directory.parent / METADATA_FILE]
    found = [path.parent for path in metadata if path.is_file()]
    return [str(there) for there in sorted(found, key=lambda there: there.stat().st_mtime)]
