"""Open a checkpoint: read its metadata once, safely, into a catalog."""

from __future__ import annotations

import re
from pathlib import Path

from shardferry.catalog import Catalog, build_catalog
from shardferry.errors import CheckpointNotFound
from shardferry.metadata import Metadata, parse_metadata
from shardferry.storage.base import RangeReader, open_storage, read_file

METADATA_FILE = ".metadata"
_RANK_METADATA = re.compile(r"__(\d+)\.metadata")  # one a rank, where the save used no collectives


def open_checkpoint(location: str | Path) -> Catalog:
    """What the checkpoint at ``location`` holds.

    Args:
        location: a directory, or its ``file://`` URL.

    Raises:
        CheckpointNotFound: no such directory, or the save was never completed (no ``.metadata``).
        UnsafeMetadata: the metadata names a forbidden global, or a file outside the checkpoint.
        CatalogError: the metadata is damaged.
    """
    storage = open_storage(location)
    try:
        return read_catalog(storage)
    finally:
        storage.close()


def read_catalog(storage: RangeReader) -> Catalog:
    """The catalog of an opened storage; see `open_checkpoint`."""
    sources = _metadata_files(storage)
    parts: dict[str, Metadata] = {}
    for name in sources:
        source = f"{storage.location}/{name}"
        parts[source] = parse_metadata(read_file(storage, name), source=source)
    return build_catalog(parts, location=storage.location)


def _metadata_files(storage: RangeReader) -> list[str]:
    names = storage.names()
    if METADATA_FILE in names:
        return [METADATA_FILE]
    parts = [name for name in names if _RANK_METADATA.fullmatch(name)]
    if parts:
        return parts
    saved = sum(name.endswith(".distcp") for name in names)
    hint = "the save was not completed" if saved else "this is no distributed checkpoint"
    raise CheckpointNotFound(
        f"{storage.location}: no {METADATA_FILE} file among {len(names)} files ({saved} of them .distcp): {hint}"
    )
