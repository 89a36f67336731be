"""On a real GPU: the arena on the device, filled through pinned memory, and the process group of NCCL."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import Shard

from shardferry.arena import DeviceArena, allocate_arena
from shardferry.checkpoint.open import open_checkpoint
from shardferry.config import LoadRequest, ReadOptions, Strategy
from shardferry.errors import ArenaError
from shardferry.exchange.agreement import Agreement
from shardferry.handoff.handle import make_handle
from shardferry.layout.mesh import Mesh
from shardferry.layout.spec import SpecLayout
from shardferry.load import LoadJob, load_rank
from tests.support.alone import save_alone
from tests.support.oracle import full_tensor
from tests.support.ranks import RankPool

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU"),
]

SHAPES = {"matrix": (513, 260), "vector": (1001,), "cube": (7, 65, 130)}


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
    device = torch.device("cuda", 0)
    job = LoadJob(
        open_checkpoint(checkpoint), spec.rank(world_rank), LoadRequest("optim"), device, ReadOptions(concurrency=4)
    )
    loaded = load_rank(job, Agreement(None))
    assert loaded.arena.device == device
    with make_handle(loaded.manifest, loaded.arena, "in_process", exclusive=True).open() as shard:
        for fqn, shape in SHAPES.items():
            for name, dtype in (("exp_avg", torch.float32), ("exp_avg_sq", torch.bfloat16)):
                found = shard.state_dict()["state"][fqn][name]
                assert found.device == device
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
    device = torch.device("cuda", 0)
    job = LoadJob(open_checkpoint(path), spec.rank(rank), LoadRequest("optim"), device, options)
    loaded = load_rank(job, Agreement(torch.distributed.group.WORLD))
    with make_handle(loaded.manifest, loaded.arena, "in_process", exclusive=True).open() as shard:
        for fqn, shape in SHAPES.items():
            found = shard.state_dict()["state"][fqn]["exp_avg"]
            assert torch.equal(found.cpu(), full_tensor(fqn, "exp_avg", shape))
    return loaded.figures().bytes_forwarded


def _columns() -> SpecLayout:
    from shardferry.layout.spec import Rule

    return SpecLayout(Mesh((("dp", 3),)), (Rule("vector", {}),), {"dp": Shard(1)})


def test_no_room_on_the_device() -> None:
    _, total = torch.cuda.mem_get_info(0)
    with pytest.raises(ArenaError, match=r"the arena needs \d+ bytes, \d+ of \d+ are free: \d+ bytes are missing"):
        allocate_arena(total * 2, torch.device("cuda", 0))


def test_an_arena_of_nothing() -> None:
    arena = DeviceArena(0, torch.device("cuda", 0))
    assert arena.tensor(0, (0, 3), torch.float32).shape == (0, 3)
