"""Find out, before anything is read, how quickly a storage answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from shardferry.checkpoint.catalog import Catalog
from shardferry.plan.costs import StorageRates
from shardferry.plan.planner import LoadPlan
from shardferry.read.source import Counters
from shardferry.storage.base import RangeReader, StorageTraits

_SMALL_BYTES = 4096
_LARGE_BYTES, _NUM_LARGE = 1 << 20, 4
_WORTH_ASKING = 128  # times the bytes of a probe: at most a hundredth is read twice
_USUAL_LOCAL = (1e-4, 3e8)  # latency in s, bytes/s: a disk, or a file system on a network
_USUAL_REMOTE = (0.02, 1e8)  # an object store, much used


def measure_rates(plan: LoadPlan, catalog: Catalog, storage: RangeReader, counters: Counters) -> StorageRates:
    """Read a little here and there of what the plan wants, and see how long it takes. Well under a second.

    Where a load is too small for that to be worth it, what is usual for the kind of storage.

    Raises:
        StorageError: a file is missing or short.
    """
    places = _large_places(plan, catalog)
    if len(places) < _NUM_LARGE or plan.bytes_needed < _WORTH_ASKING * _NUM_LARGE * _LARGE_BYTES:
        return _usual(storage.traits)

    def read(place: tuple[str, int], nbytes: int) -> None:
        counters.asked(num_requests=1, nbytes=nbytes)
        storage.read_into(place[0], place[1], memoryview(bytearray(nbytes)))

    latency_s = min(_seconds(partial(read, place, _SMALL_BYTES)) for place in places[:2])
    with ThreadPoolExecutor(_NUM_LARGE, thread_name_prefix="shardferry-probe") as pool:
        elapsed_s = _seconds(lambda: list(pool.map(partial(read, nbytes=_LARGE_BYTES), places)))
    rate = _NUM_LARGE * _LARGE_BYTES / max(elapsed_s - latency_s, 1e-6)
    return StorageRates(latency_s, rate, storage.traits.is_local)


def _usual(traits: StorageTraits) -> StorageRates:
    latency_s, bytes_per_s = _USUAL_LOCAL if traits.is_local else _USUAL_REMOTE
    return StorageRates(latency_s, bytes_per_s, traits.is_local)


def _large_places(plan: LoadPlan, catalog: Catalog) -> list[tuple[str, int]]:
    """File and byte offset of some wanted chunks that are large enough, spread over the plan."""
    chunks = np.unique(np.array([read.chunk for read in plan.reads], dtype=np.int64))
    large = chunks[catalog.chunk_byte_length[chunks] >= _LARGE_BYTES]
    spread = large[np.linspace(0, len(large) - 1, min(_NUM_LARGE, len(large)), dtype=np.int64)]
    return [(catalog.files[catalog.chunk_file[c]], int(catalog.chunk_byte_offset[c])) for c in spread.tolist()]


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
