"""Keep the catalogs of checkpoints on disk, by the digest of their metadata, so that these are unpickled once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shardferry.checkpoint.cache_directory import MAX_BYTES, CacheChoice, CacheDirectory, directory_of
from shardferry.checkpoint.catalog import Catalog
from shardferry.checkpoint.catalog_file import CATALOG_FILE, decode_catalog, encode_catalog


@dataclass(frozen=True, slots=True)
class CatalogCache:
    """A directory of catalogs."""

    directory: Path
    min_metadata_bytes: int = 4 * 1024 * 1024  # what is smaller opens in a tenth of a second as it is
    max_bytes: int = MAX_BYTES  # of all that the directory keeps

    @classmethod
    def of(cls, choice: CacheChoice) -> CatalogCache | None:
        """What a caller chose: a directory, the user's own (True), or none."""
        directory = directory_of(choice)
        return None if directory is None else cls(directory)

    def get(self, digest: bytes, *, location: str) -> Catalog | None:
        """The catalog of metadata of this digest; None where there is none that can be used."""
        return self._files.get(CATALOG_FILE, digest, partial(decode_catalog, location=location))

    def put(self, digest: bytes, catalog: Catalog) -> None:
        """Keep the catalog of metadata of this digest, as far as that can be done."""
        self._files.put(CATALOG_FILE, digest, encode_catalog(catalog))

    @property
    def _files(self) -> CacheDirectory:
        return CacheDirectory(self.directory, self.max_bytes)
