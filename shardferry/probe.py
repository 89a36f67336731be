"""Find out, without reading, whether a storage will answer from memory: whether the page cache has what is wanted."""

from __future__ import annotations

import numpy as np

from shardferry.catalog import Catalog
from shardferry.plan import LoadPlan
from shardferry.storage.base import RangeReader

_SAMPLES = 32
_ENOUGH = 0.9  # of the samples


def answers_from_memory(plan: LoadPlan, catalog: Catalog, storage: RangeReader) -> bool:
    """Whether nearly all of a plan's reads will find their bytes in memory. Asks no disk and no network.

    Raises:
        StorageError: a file is missing.
    """
    if not storage.traits.is_local or not plan.reads:
        return False
    places = np.linspace(0, len(plan.reads) - 1, min(_SAMPLES, len(plan.reads)), dtype=np.int64)
    chunks = [plan.reads[place].chunk for place in places.tolist()]
    found = sum(storage.is_in_memory(catalog.files[catalog.chunk_file[c]], _middle(catalog, c)) for c in chunks)
    return found >= _ENOUGH * len(chunks)


def _middle(catalog: Catalog, chunk: int) -> int:
    return int(catalog.chunk_byte_offset[chunk]) + int(catalog.chunk_byte_length[chunk]) // 2
