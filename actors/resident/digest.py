"""The digest of a checkpoint, as kept state records it: of what its catalog says, and of the versions of its files."""

from __future__ import annotations

import hashlib

import numpy as np

from shardferry.checkpoint.catalog import Catalog


def digest_of(catalog: Catalog) -> str:
    """SHA-256 in hex. A later save to the same place has another one, where the storage tells versions or the metadata differs."""
    tensors = [(t.key, t.shape, str(t.dtype), t.chunks.start, t.chunks.stop) for t in catalog.tensors.values()]
    objects = [(o.key, o.file, o.byte_offset, o.byte_length) for o in catalog.objects.values()]
    files = [catalog.files, sorted(catalog.file_bytes.items()), sorted(catalog.file_versions.items())]
    whole = hashlib.sha256(repr((tensors, objects, files)).encode())
    for column in (
        catalog.chunk_file,
        catalog.chunk_byte_offset,
        catalog.chunk_byte_length,
        catalog.box_offsets,
        catalog.box_sizes,
    ):
        whole.update(np.ascontiguousarray(column).data)
    return whole.hexdigest()
