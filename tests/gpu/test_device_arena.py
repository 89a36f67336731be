"""On a real GPU: the arena on the device, filled through pinned memory, by one rank and by two that read for each other."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.tensor import Shard

from shardferry.arena import DeviceArena, DeviceMemory, allocate_arena
from shardferry.checkpoint.open import open_checkpoint
from shardferry.config import LoadRequest, ReadOptions, Strategy
from shardferry.errors import ArenaError
from shardferry.exchange.agreement import Agreement
from shardferry.handoff.handle import make_handle
from shardferry.layout.mesh import Mesh
from shardferry.layout.spec import Rule, SpecLayout
from shardferry.load import LoadJob, load_rank
from shardferry.stats import BusyTimes
from tests.support.alone import save_alone
from tests.support.oracle import full_tensor
from tests.support.ranks import RankPool

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU"),
]

GPU = torch.device("cuda", 0)
SHAPES = {"matrix": (513, 260), "vector": (1001,), "cube": (7, 65, 130)}


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    """Two processes that are spawned: CUDA doesn't work in forked ones."""
    pool = RankPool(2, context=multiprocessing.get_context("spawn"))
    yield pool
    pool.close()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Row-major, transposed and bfloat16 state, written by stock torch."""
    state: dict[str, dict[str, torch.Tensor]] = {}
    for fqn, shape in SHAPES.items():
        state[fqn] = {
            "exp_avg": full_tensor(fqn, "exp_avg", shape),
            "exp_avg_sq": full_tensor(fqn, "exp_avg_sq", shape, torch.bfloat16),
        }
    state["matrix"]["exp_avg"] = state["matrix"]["exp_avg"].t().contiguous().t()
    save_alone({"optim": {"state": state}}, tmp_path / "ckpt")
    return tmp_path / "ckpt"


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("world_rank", [0, 1, 2])
def test_every_element_on_the_device(checkpoint: Path, dim: int, world_rank: int) -> None:
    spec = SpecLayout(Mesh((("dp", 3),)), (), {"dp": Shard(dim)}) if dim == 0 else _columns()
    job = LoadJob(
        open_checkpoint(checkpoint), spec.rank(world_rank), LoadRequest("optim"), GPU, ReadOptions(concurrency=4)
    )
    loaded = load_rank(job, Agreement(None))
    assert loaded.arena.device == GPU
    with make_handle(loaded.manifest, loaded.arena, "in_process", exclusive=True).open() as shard:
        for fqn, shape in SHAPES.items():
            for name, dtype in (("exp_avg", torch.float32), ("exp_avg_sq", torch.bfloat16)):
                found = shard.state_dict()["state"][fqn][name]
                assert found.device == GPU
                for whole, local in shard.regions(fqn, name):
                    box = tuple(slice(o, e) for o, e in zip(whole.offsets, whole.ends, strict=True))
                    here = tuple(slice(o, e) for o, e in zip(local.offsets, local.ends, strict=True))
                    assert torch.equal(found[here].cpu(), full_tensor(fqn, name, shape, dtype)[box])


@pytest.mark.parametrize("strategy", ["cooperative", "auto"])
def test_ranks_with_arenas_on_gpus_read_for_each_other(checkpoint: Path, ranks: RankPool, strategy: str) -> None:
    """Each is an island by itself: what one reads for another goes through the process group, and to the GPU there."""
    results = ranks.run(2, load_replicas, str(checkpoint), strategy)
    if strategy == "cooperative":
        assert sum(results) > 0


def load_replicas(path: str, strategy: Strategy) -> int:
    """Bytes that went to the other rank."""
    spec = SpecLayout(Mesh((("copies", 2),)))
    options = ReadOptions(concurrency=4, load_s=60, strategy=strategy)
    rank = torch.distributed.get_rank()
    job = LoadJob(open_checkpoint(path), spec.rank(rank), LoadRequest("optim"), GPU, options)
    loaded = load_rank(job, Agreement(torch.distributed.group.WORLD))
    with make_handle(loaded.manifest, loaded.arena, "in_process", exclusive=True).open() as shard:
        for fqn, shape in SHAPES.items():
            found = shard.state_dict()["state"][fqn]["exp_avg"]
            assert torch.equal(found.cpu(), full_tensor(fqn, "exp_avg", shape))
    return loaded.figures().bytes_forwarded


def _columns() -> SpecLayout:
    return SpecLayout(Mesh((("dp", 3),)), (Rule("vector", {}),), {"dp": Shard(1)})


def test_no_room_on_the_device() -> None:
    _, total = torch.cuda.mem_get_info(0)
    with pytest.raises(ArenaError, match=r"the arena needs \d+ bytes, \d+ of \d+ are free: \d+ bytes are missing"):
        allocate_arena(total * 2, GPU)


def test_writes_from_several_threads_are_in_place_at_the_end() -> None:
    """Contiguous ones of all sizes, also beyond a staging buffer's, and columns of a matrix."""
    rows, columns, num_bytes = 3000, 16, 64 * 2**20
    arena = DeviceArena(num_bytes + rows * columns * 8, GPU)
    memory, generator = DeviceMemory(arena, BusyTimes()), np.random.default_rng(5)
    expected = generator.integers(0, 256, num_bytes, dtype=np.uint8)
    matrix = generator.integers(0, 2**63, (rows, columns), dtype=np.int64)
    cuts = sorted({0, num_bytes, 20 * 2**20, 40 * 2**20, *generator.integers(0, num_bytes, 500).tolist()})
    pieces = list(pairwise(cuts))

    def write(number: int) -> None:
        for start, stop in pieces[number::4]:
            memory.write(start, expected[start:stop].data)
        for column in range(number, columns, 4):
            memory.scatter(num_bytes + 8 * column, matrix[:, column].view(np.uint64), (8 * columns,))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    memory.finish()
    assert np.array_equal(arena.tensor(0, (num_bytes,), torch.uint8).cpu().numpy(), expected)
    assert np.array_equal(arena.tensor(num_bytes, (rows, columns), torch.int64).cpu().numpy(), matrix)


def test_an_arena_that_is_closed_gives_its_memory_back() -> None:
    torch.cuda.empty_cache()
    before, _ = torch.cuda.mem_get_info(GPU)
    arena = DeviceArena(256 * 2**20, GPU)
    assert torch.cuda.mem_get_info(GPU)[0] <= before - 256 * 2**20
    arena.close()
    assert torch.cuda.mem_get_info(GPU)[0] > before - 128 * 2**20


def test_an_arena_of_nothing() -> None:
    arena = DeviceArena(0, GPU)
    assert arena.tensor(0, (0, 3), torch.float32).shape == (0, 3)
