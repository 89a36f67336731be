"""Open a checkpoint: read its metadata once, safely, into a catalog."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardferry.catalog import Catalog, build_catalog
from shardferry.errors import CheckpointNotFound
from shardferry.metadata import Metadata, parse_metadata
from shardferry.storage.base import RangeReader, open_storage, read_file

METADATA_FILE = ".metadata"
_RANK_METADATA = re.compile(r"__(\d+)\.metadata")  # one a rank, where the save used no collectives


def open_checkpoint(location: str | Path, *, storage_options: Mapping[str, Any] | None = None) -> Catalog:
    """What the checkpoint at ``location`` holds.

    Args:
        location: a directory, its ``file://`` URL, or any URL that fsspec can open, such as ``s3://bucket/run/step-1000``.
        storage_options: for fsspec: credentials, an endpoint. They go with the catalog, to every process that reads.

    Raises:
        CheckpointNotFound: no such directory, or the save was never completed (no ``.metadata``).
        UnsafeMetadata: the metadata names a forbidden global, or a file outside the checkpoint.
        CatalogError: the metadata is damaged.
    """
    storage = open_storage(location, storage_options)
    try:
        return dataclasses.replace(read_catalog(storage), storage_options=dict(storage_options or {}))
    finally:
        storage.close()


def storage_of(catalog: Catalog) -> RangeReader:
    """The storage that a catalog is of. Raises CheckpointNotFound where it is gone."""
    return open_storage(catalog.location, catalog.storage_options)


def read_catalog(storage: RangeReader) -> Catalog:
    """The catalog of an opened storage; see `open_checkpoint`."""
    listing = storage.listing()
    sources = _metadata_files(storage.location, list(listing))
    parts: dict[str, Metadata] = {}
    for name in sources:
        source = f"{storage.location}/{name}"
        parts[source] = parse_metadata(read_file(storage, name), source=source)
    return build_catalog(parts, location=storage.location, listing=listing)


def _metadata_files(location: str, names: list[str]) -> list[str]:
    if METADATA_FILE in names:
        return [METADATA_FILE]
    parts = [name for name in names if _RANK_METADATA.fullmatch(name)]
    if parts:
        return parts
    saved = sum(name.endswith(".distcp") for name in names)
    hint = "the save was not completed" if saved else "this is no distributed checkpoint"
    raise CheckpointNotFound(
        f"{location}: no {METADATA_FILE} file among {len(names)} files ({saved} of them .distcp): {hint}"
    )
