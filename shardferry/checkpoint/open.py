"""Open a checkpoint: read its metadata once, safely, into a catalog."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from shardferry.checkpoint.build import build_catalog
from shardferry.checkpoint.cache import CatalogCache
from shardferry.checkpoint.catalog import Catalog
from shardferry.checkpoint.megatron import COMMON_FILE, with_common_values
from shardferry.checkpoint.metadata_files import MetadataFiles
from shardferry.checkpoint.safetensors_files import (
    INDEX_FILE,
    SINGLE_FILE,
    is_safetensors,
    read_safetensors,
    with_safetensors_positions,
)
from shardferry.errors import CatalogError, CheckpointNotFound, MissingFile
from shardferry.storage.base import RangeReader, read_file
from shardferry.storage.open import open_storage
from shardferry.storage.retry import RetryPolicy

CacheDirectory = str | os.PathLike[str] | None  # None: no catalog is kept

METADATA_FILE = ".metadata"
_RANK_METADATA = re.compile(r"__(\d+)\.metadata")  # one a rank, where the save used no collectives


def open_checkpoint(
    location: str | Path, *, storage_options: Mapping[str, Any] | None = None, cache: CacheDirectory = None
) -> Catalog:
    """What the checkpoint at ``location`` holds.

    Args:
        location: a directory, its ``file://`` URL, or the URL of an object store (``s3://bucket/run/step-1000``), of a web
            server, or of anything else that fsspec can open.
        storage_options: credentials, an endpoint, ... (docs/storage.md). They go with the catalog, to every process that
            reads.
        cache: a directory that keeps catalogs, by the digest of their metadata (docs/scale.md); default: nothing is kept.

    Raises:
        CheckpointNotFound: no such directory, or the save was never completed (no ``.metadata``).
        UnsafeMetadata: the metadata names a forbidden global, or a file outside the checkpoint.
        CatalogError: the metadata is damaged.
    """
    with closing(open_storage(location, storage_options)) as storage:
        return read_catalog(storage, cache=cache, storage_options=storage_options)


@contextmanager
def opened_storage(catalog: Catalog, *, retry: RetryPolicy | None = None) -> Iterator[RangeReader]:
    """As `storage_of`, closed at the end of the ``with``."""
    with closing(storage_of(catalog, retry=retry)) as storage:
        yield storage


def storage_of(catalog: Catalog, *, retry: RetryPolicy | None = None) -> RangeReader:
    """The storage that a catalog is of; its files must be those that the catalog was made of.

    Raises CheckpointNotFound where it is gone.
    """
    storage = open_storage(catalog.location, catalog.storage_options, retry=retry)
    storage.expect(catalog.file_versions)
    return storage


def read_catalog(
    storage: RangeReader, *, cache: CacheDirectory = None, storage_options: Mapping[str, Any] | None = None
) -> Catalog:
    """The catalog of an opened storage; see `open_checkpoint`."""
    listing = storage.listing() if storage.traits.has_listing else _known_files(storage)
    versions = storage.versions()
    catalog = _of_metadata(storage, list(listing), cache)
    catalog = dataclasses.replace(
        catalog,
        file_bytes={file: size for file in catalog.files if (size := listing.get(file)) is not None},
        file_versions={file: versions[file] for file in catalog.files if file in versions},
        storage_options=dict(storage_options or {}),
    )
    if COMMON_FILE in listing:
        return with_common_values(catalog, read_file(storage, COMMON_FILE))
    return catalog


def _of_metadata(storage: RangeReader, names: list[str], cache: CacheDirectory) -> Catalog:
    sources = _metadata_files(storage.location, names)
    if not sources and is_safetensors(names):
        return build_catalog([(storage.location, read_safetensors(storage, names))], location=storage.location)
    if not sources:
        raise _no_checkpoint(storage.location, names) if storage.traits.has_listing else _not_served(storage.location)
    files = MetadataFiles.read(storage, sources)
    return with_safetensors_positions(_cached(files, storage.location, cache), storage)


def _cached(files: MetadataFiles, location: str, directory: CacheDirectory) -> Catalog:
    """The catalog of the metadata files alone: only that is kept."""
    if directory is None:
        return build_catalog(files.parsed(location), location=location)
    cache, digest = CatalogCache(Path(directory).expanduser()), files.digest()
    catalog = cache.get(digest, location=location)
    if catalog is None:
        catalog = build_catalog(files.parsed(location), location=location)
        cache.put(digest, catalog)
    return catalog


def _known_files(storage: RangeReader) -> dict[str, int | None]:
    """The files of a storage that can't list, as far as their names are known: those that a checkpoint begins with."""
    names = sorted((METADATA_FILE, COMMON_FILE, INDEX_FILE, SINGLE_FILE))

    def size_of(name: str) -> int | None:
        with suppress(MissingFile):
            return storage.size(name)
        return None

    with ThreadPoolExecutor(len(names), thread_name_prefix="shardferry-open") as pool:
        found = zip(names, pool.map(size_of, names), strict=True)
        return {name: size for name, size in found if size is not None}


def _metadata_files(location: str, names: list[str]) -> list[str]:
    if METADATA_FILE in names:
        return [METADATA_FILE]
    parts = {int(found[1]): name for name in names if (found := _RANK_METADATA.fullmatch(name))}
    _check_ranks(location, parts)
    return [parts[rank] for rank in sorted(parts)]


def _check_ranks(location: str, parts: Mapping[int, str]) -> None:
    """Each rank wrote its own metadata: one that is missing before the last was lost. (After the last, none can know.)"""
    last = max(parts, default=-1)
    lost = sorted(set(range(last)) - set(parts))
    if lost:
        raise CatalogError(
            f"{location}: {len(parts)} ranks wrote metadata of their own, up to {parts[last]}, but that of rank {lost[0]} "
            f"is missing ({len(lost)} of {last + 1} are); without it its share can't be found. Copy all of the checkpoint, "
            "or use another one"
        )


def _no_checkpoint(location: str, names: list[str]) -> CheckpointNotFound:
    saved = sum(name.endswith(".distcp") for name in names)
    hint = "the save was not completed" if saved else "this is no distributed checkpoint"
    return CheckpointNotFound(
        f"{location}: no {METADATA_FILE} file among {len(names)} files ({saved} of them .distcp): {hint}"
    )


def _not_served(location: str) -> CheckpointNotFound:
    return CheckpointNotFound(
        f"{location}: no {METADATA_FILE} file, and no {INDEX_FILE}. Other files can't be found here, as a web server doesn't "
        "list what it has: neither metadata that each rank wrote for itself (__0.metadata, ...) nor whether the save was "
        'completed. Where the server has an index page of the directory, storage_options={"client": "fsspec"} reads that'
    )
