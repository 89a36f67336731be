"""What the reader asks of a storage: which files, in which order, how often, and what it says when that goes wrong."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.tensor import Shard

from shardferry.arena import HostArena
from shardferry.checkpoint.catalog import Catalog
from shardferry.checkpoint.open import open_checkpoint
from shardferry.config import LoadRequest, ReadOptions
from shardferry.errors import DecodeError, StorageError
from shardferry.layout.mesh import Mesh
from shardferry.layout.spec import SpecLayout
from shardferry.plan.load_plan import LoadPlan
from shardferry.plan.planner import plan_load
from shardferry.read.execute import read_plan
from shardferry.stats import Counters
from shardferry.storage.local import LocalReader
from tests.support.alone import save_alone
from tests.support.damage import KEY, edit_metadata
from tests.support.oracle import full_tensor


class RecordingReader(LocalReader):
    """Remembers which files were opened, and where data was read."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.opened: list[str] = []
        self.reads: list[tuple[str, int, int]] = []  # file, byte offset, bytes

    def _open(self, path: str) -> int:
        self.opened.append(path)
        return super()._open(path)

    def read_into(self, path: str, byte_offset: int, *buffers: memoryview) -> None:
        self.reads.append((path, byte_offset, sum(map(len, buffers))))
        super().read_into(path, byte_offset, *buffers)

    def mapped(self, path: str, start: int, stop: int) -> memoryview:
        self.reads.append((path, start, stop - start))
        return super().mapped(path, start, stop)


class StuckReader(LocalReader):
    """A storage that never answers, until it is released."""

    def __init__(self, directory: Path, released: threading.Event) -> None:
        super().__init__(directory)
        self._released = released

    def read_into(self, path: str, byte_offset: int, *buffers: memoryview) -> None:
        self._released.wait(30)
        super().read_into(path, byte_offset, *buffers)


def save(path: Path, shapes: dict[str, tuple[int, ...]], *, num_files: int = 1) -> Path:
    """State of the oracle, by stock torch, whose writer spreads the tensors over the files."""
    state = {fqn: {"exp_avg": full_tensor(fqn, "exp_avg", shape)} for fqn, shape in shapes.items()}
    writer = FileSystemWriter(path, thread_count=num_files)
    save_alone({"optim": {"state": state}}, path, storage_writer=writer)
    return path


def plan_of(catalog: Catalog, *, world_rank: int = 0, world_size: int = 1, dim: int = 0) -> LoadPlan:
    layout = SpecLayout(Mesh((("dp", world_size),)), default={"dp": Shard(dim)}).rank(world_rank)
    return plan_load(catalog, layout, LoadRequest("optim"))


def read(plan: LoadPlan, catalog: Catalog, storage: LocalReader, options: ReadOptions) -> tuple[HostArena, Counters]:
    arena, counters = HostArena(plan.arena_bytes), Counters()
    try:
        read_plan(plan, catalog, storage, arena, options, counters)
    finally:
        storage.close()
    return arena, counters


def check(plan: LoadPlan, arena: HostArena) -> int:
    """Every element of every tensor against the oracle, bitwise; returns how many."""
    compared = 0
    for planned in plan.tensors:
        local = arena.tensor(planned.arena_offset, planned.layout.local_shape, planned.dtype)
        whole = full_tensor(planned.fqn, planned.name, planned.layout.global_shape)
        for box in planned.layout.boxes:
            found = local[tuple(map(slice, box.local.offsets, box.local.ends))]
            wanted = whole[tuple(map(slice, box.region.offsets, box.region.ends))]
            assert torch.equal(found, wanted), planned.fqn
            compared += found.numel()
    return compared


SMALL = {f"w{number}": (number % 7 + 1, number % 5 + 1) for number in range(300)}


@pytest.mark.parametrize("num_files", [1, 3])
@pytest.mark.parametrize("concurrency", [1, 8])
@pytest.mark.parametrize("dim", [0, 1])
def test_many_small_tensors(tmp_path: Path, dim: int, concurrency: int, num_files: int) -> None:
    path = save(tmp_path / "ckpt", SMALL, num_files=num_files)
    catalog, compared = open_checkpoint(path), 0
    for rank in range(2):
        plan, storage = plan_of(catalog, world_rank=rank, world_size=2, dim=dim), RecordingReader(path)
        arena, counters = read(plan, catalog, storage, ReadOptions(concurrency=concurrency))
        compared += check(plan, arena)
        assert sorted(storage.opened) == sorted(catalog.files)
        assert len(catalog.files) == num_files
        assert counters.bytes_done == plan.bytes_needed
        assert counters.bytes_requested == sum(nbytes for _, _, nbytes in storage.reads) > 0
    assert compared == sum(torch.Size(shape).numel() for shape in SMALL.values())


@pytest.mark.parametrize("concurrency", [1, 8])
def test_only_the_wanted_rows_are_asked_for(tmp_path: Path, concurrency: int) -> None:
    path = save(tmp_path / "ckpt", {f"w{number}": (512, 512) for number in range(8)})
    catalog = open_checkpoint(path)
    plan, storage = plan_of(catalog, world_rank=1, world_size=4), RecordingReader(path)
    arena, counters = read(plan, catalog, storage, ReadOptions(concurrency=concurrency))
    assert check(plan, arena) * 4 == plan.bytes_needed == 8 * 128 * 512 * 4
    asked = sum(nbytes for _, _, nbytes in storage.reads)
    assert plan.bytes_needed < asked == counters.bytes_requested <= 1.05 * plan.bytes_needed
    assert counters.num_requests == 2 * 8, "the rows of each, and its head, which is far from them"


def test_a_tensor_longer_than_one_request(tmp_path: Path) -> None:
    path = save(tmp_path / "ckpt", {"big": (1100, 4096)})
    catalog = open_checkpoint(path)
    for dim in (0, 1):
        plan, storage = plan_of(catalog, world_rank=1, world_size=2, dim=dim), RecordingReader(path)
        arena, counters = read(plan, catalog, storage, ReadOptions())
        assert check(plan, arena) == 1100 * 4096 // 2
        assert max(nbytes for _, _, nbytes in storage.reads) <= 8 * 1024 * 1024
        assert counters.bytes_done == plan.bytes_needed


def test_ranks_start_at_different_files(tmp_path: Path) -> None:
    path = save(tmp_path / "ckpt", {f"w{number}": (8, 8) for number in range(12)}, num_files=4)
    catalog, first = open_checkpoint(path), []
    for rank in range(4):
        storage = RecordingReader(path)
        read(plan_of(catalog, world_rank=rank, world_size=4), catalog, storage, ReadOptions(concurrency=1))
        first.append(storage.reads[0][0])
    assert first == sorted(catalog.files)


def test_an_item_of_another_dtype_than_the_metadata_says(tmp_path: Path) -> None:
    path = save(tmp_path / "ckpt", {"even.weight": (4, 6)})

    def edit(metadata: object) -> None:
        metadata.state_dict_metadata[KEY].properties.dtype = torch.int32

    edit_metadata(path, edit)
    catalog = open_checkpoint(path)
    says = rf"^{KEY}: item at byte 0 of .*: it holds torch.float32 of shape \(4, 6\), the metadata says torch.int32"
    with pytest.raises(DecodeError, match=says):
        read(plan_of(catalog), catalog, LocalReader(path), ReadOptions())


@pytest.fixture
def released() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize("concurrency", [1, 8])
def test_a_storage_that_does_not_answer(tmp_path: Path, released: threading.Event, concurrency: int) -> None:
    path = save(tmp_path / "ckpt", {f"w{number}": (8, 8) for number in range(200)})
    catalog = open_checkpoint(path)
    # The error comes when the reads that are under way have ended: their memory is the arena's.
    threading.Timer(0.5, released.set).start()
    with pytest.raises(StorageError, match=r"\d+ of \d+ reads are not done within timeouts\.load_s"):
        read(plan_of(catalog), catalog, StuckReader(path, released), ReadOptions(concurrency=concurrency, load_s=0.1))
