"""What a rank's reads hold and have in flight, how many requests a chunk costs, and what happens where guesses are wrong."""

from __future__ import annotations

import threading
import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.serialization import config

from shardferry.arena import HostArena
from shardferry.checkpoint.catalog import Catalog
from shardferry.checkpoint.open import open_checkpoint
from shardferry.config import ReadOptions
from shardferry.layout.tensor_layout import single_box
from shardferry.plan.load_plan import LoadPlan
from shardferry.plan.planner import plan_tensors
from shardferry.read.buffers import buffer_bytes
from shardferry.read.execute import read_plan
from shardferry.read.schedule import requests_of_plan
from shardferry.region import Region
from shardferry.stats import Counters
from shardferry.storage.base import OBJECT_STORE, StorageTraits
from shardferry.storage.local import LOCAL_FILES, LocalReader
from tests.support.chunk_files import Chunk, write_chunks
from tests.support.loads import bits
from tests.support.oracle import full_tensor

KIB = 1024
REMOTE = replace(OBJECT_STORE, max_gap_bytes=16 * KIB, max_over_read=2.0, max_request_bytes=256 * KIB)


class Counted(LocalReader):
    """Files that behave like those of another storage; knows what is in flight, and what of it is for no arena."""

    def __init__(self, directory: Path, traits: StorageTraits, *, latency_s: float = 0.0) -> None:
        super().__init__(directory)
        self.traits = traits
        self.asked: list[tuple[int, int]] = []  # start and stop
        self.most_in_flight = 0
        self._latency_s = latency_s
        self._in_flight = 0
        self._count = threading.Lock()

    def read_into(self, path: str, byte_offset: int, *buffers: memoryview) -> None:
        with self._count:
            self.asked.append((byte_offset, byte_offset + sum(map(len, buffers))))
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
        time.sleep(self._latency_s)
        super().read_into(path, byte_offset, *buffers)
        with self._count:
            self._in_flight -= 1


def save(path: Path, tensors: dict[str, torch.Tensor]) -> Catalog:
    write_chunks(path, {key: (t.shape, [Chunk(Region.whole(t.shape), t)]) for key, t in tensors.items()})
    return open_checkpoint(path)


def tensors_of(shapes: Sequence[tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {f"w{n:03}": full_tensor(f"w{n:03}", "exp_avg", shape) for n, shape in enumerate(shapes)}


def plan_of(catalog: Catalog, regions: dict[str, Region]) -> LoadPlan:
    wanted = [(key, single_box(catalog.tensors[key].shape, region)) for key, region in regions.items()]
    return plan_tensors(catalog, wanted, world_rank=0, world_size=1)


def read(
    catalog: Catalog, storage: LocalReader, tensors: dict[str, torch.Tensor], regions: dict[str, Region], **options: Any
) -> Counters:
    """Load boxes and compare; what was asked for must be what was predicted."""
    plan, counters = plan_of(catalog, regions), Counters()
    arena, chosen = HostArena(plan.arena_bytes), ReadOptions(**options)
    read_plan(plan, catalog, storage, arena, chosen, counters)
    storage.close()
    for planned in plan.tensors:
        found = arena.tensor(planned.arena_offset, planned.layout.local_shape, planned.dtype)
        region = regions[planned.key]
        wanted = tensors[planned.key][tuple(map(slice, region.offsets, region.ends))]
        assert bits(found) == bits(wanted), planned.key
    assert counters.bytes_done == plan.bytes_needed
    return counters


def predicted(catalog: Catalog, regions: dict[str, Region], traits: StorageTraits) -> tuple[int, int]:
    return requests_of_plan(plan_of(catalog, regions), catalog, traits.read_limits(ReadOptions()))


def whole(shapes: dict[str, torch.Tensor]) -> dict[str, Region]:
    return {key: Region.whole(t.shape) for key, t in shapes.items()}


def columns(tensors: dict[str, torch.Tensor], part: int) -> dict[str, Region]:
    """The second of ``part`` equal parts of each, by columns."""
    return {k: Region((0, t.shape[1] // part), (t.shape[0], t.shape[1] // part)) for k, t in tensors.items()}


def rows(tensors: dict[str, torch.Tensor], part: int) -> dict[str, Region]:
    """The second of ``part`` equal parts of each, by rows."""
    return {k: Region((t.shape[0] // part, 0), (t.shape[0] // part, t.shape[1])) for k, t in tensors.items()}


LARGE = [(96 + 16 * n, 512) for n in range(12)]  # 192 KiB and more
SMALL = [(8, 64)] * 200  # 2 KiB

# Store, shapes, what is wanted, and the requests that it costs.
CASES = {
    "large, whole": (LOCAL_FILES, LARGE, whole, 12),
    "large, first rows": (LOCAL_FILES, LARGE, lambda t: {k: Region((0, 0), (9, 512)) for k in t}, 12),
    "large, later rows": (LOCAL_FILES, LARGE, lambda t: rows(t, 2), 24),
    "large, columns": (LOCAL_FILES, LARGE, lambda t: columns(t, 2), 12),
    "small, whole": (LOCAL_FILES, SMALL, whole, 1),
    "small, columns": (LOCAL_FILES, SMALL, lambda t: columns(t, 4), 1),
    "store, small, columns": (REMOTE, SMALL, lambda t: columns(t, 4), 3),
    "store, small, later rows": (REMOTE, SMALL, lambda t: rows(t, 4), 3),
    "store, large, columns": (REMOTE, LARGE, lambda t: columns(t, 2), 24),
    "store, large, whole": (REMOTE, LARGE, whole, 1 + 1 + 8 * 2 + 2 * 3),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("concurrency", [1, 4])
def test_requests_are_few_and_predicted(tmp_path: Path, case: str, concurrency: int) -> None:
    traits, shapes, wanted, num_requests = CASES[case]
    tensors = tensors_of(shapes)
    catalog, regions = save(tmp_path / "ckpt", tensors), wanted(tensors)
    storage = Counted(tmp_path / "ckpt", traits)
    counters = read(catalog, storage, tensors, regions, concurrency=concurrency)
    assert (counters.bytes_requested, counters.num_requests) == predicted(catalog, regions, traits)
    assert counters.num_requests == num_requests
    assert all(stop - start <= traits.max_request_bytes for start, stop in storage.asked)


@pytest.mark.parametrize("concurrency", [1, 3, 16])
def test_requests_in_flight(tmp_path: Path, concurrency: int) -> None:
    tensors = tensors_of(LARGE * 2)
    catalog = save(tmp_path / "ckpt", tensors)
    storage = Counted(tmp_path / "ckpt", REMOTE, latency_s=0.01)
    read(catalog, storage, tensors, columns(tensors, 2), concurrency=concurrency)
    assert 0 < storage.most_in_flight <= concurrency
    assert storage.most_in_flight > 1 or concurrency == 1


@pytest.mark.parametrize("holds_bodies", [False, True])
@pytest.mark.parametrize("budget", [300 * KIB, 1_200 * KIB])
def test_buffers_stay_within_the_budget(tmp_path: Path, budget: int, holds_bodies: bool) -> None:
    """Counted by the budget, and seen by tracemalloc, which knows of every buffer."""
    tensors = tensors_of(LARGE * 4 + SMALL)
    catalog = save(tmp_path / "ckpt", tensors)
    storage = Counted(tmp_path / "ckpt", replace(REMOTE, holds_bodies=holds_bodies), latency_s=0.001)
    plan, counters = plan_of(catalog, columns(tensors, 2)), Counters()
    arena = HostArena(plan.arena_bytes)
    tracemalloc.start()
    try:
        options = ReadOptions(concurrency=16, memory_budget=budget)
        read_plan(plan, catalog, storage, arena, options, counters)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    storage.close()
    if holds_bodies and budget < 2 * REMOTE.max_request_bytes:  # one request holds more, and is admitted alone
        assert counters.peak_buffer_bytes <= 2 * buffer_bytes(REMOTE.max_request_bytes)
        return
    assert 200 * KIB < counters.peak_buffer_bytes <= budget
    assert storage.most_in_flight > 1
    assert peak <= budget + 768 * KIB, "buffers, and the plan's objects"


def test_only_the_opening_of_an_item_needs_a_buffer(tmp_path: Path) -> None:
    tensors = tensors_of([(2048, 512)] * 4)  # 4 MiB: 17 requests each
    catalog = save(tmp_path / "ckpt", tensors)
    counters = read(catalog, Counted(tmp_path / "ckpt", REMOTE), tensors, whole(tensors), concurrency=4)
    assert counters.peak_buffer_bytes <= 4 * REMOTE.max_request_bytes, "the first of the requests of each"


def other_alignment(path: Path, tensors: dict[str, torch.Tensor]) -> Catalog:
    """Heads that end elsewhere, in items of the usual length or not."""
    before, config.save.storage_alignment = config.save.storage_alignment, 128
    try:
        return save(path, tensors)
    finally:
        config.save.storage_alignment = before


WRONG = {
    "all transposed": lambda t, n: t.t().contiguous().t(),
    "one transposed": lambda t, n: t.t().contiguous().t() if n == 7 else t,
    "the first transposed": lambda t, n: t.t().contiguous().t() if n == 0 else t,
}


@pytest.mark.parametrize("traits", [LOCAL_FILES, REMOTE], ids=["local", "store"])
@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("wrong", [*WRONG, "aligned elsewhere"])
def test_wrong_guesses_are_found_out(tmp_path: Path, wrong: str, concurrency: int, traits: StorageTraits) -> None:
    tensors = tensors_of(LARGE)
    if wrong in WRONG:
        tensors = {key: WRONG[wrong](t, n) for n, (key, t) in enumerate(tensors.items())}
    catalog = (save if wrong in WRONG else other_alignment)(tmp_path / "ckpt", tensors)
    for wanted in (whole(tensors), columns(tensors, 2), rows(tensors, 2)):
        counters = read(catalog, Counted(tmp_path / "ckpt", traits), tensors, wanted, concurrency=concurrency)
        stored = sum(int(catalog.chunk_byte_length[saved.chunks[0]]) for saved in catalog.tensors.values())
        assert counters.bytes_requested <= 2 * stored, "what a wrong expectation costs is bounded"
