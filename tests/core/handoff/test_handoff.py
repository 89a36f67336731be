"""Shards that a loader read from a real checkpoint, opened in another process, by each transport."""

from __future__ import annotations

import mmap
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardOf
from torch.distributed.tensor import Shard as TorchShard

from shardferry.arena import HostArena
from shardferry.checkpoint.open import open_checkpoint
from shardferry.config import LoadRequest, ReadOptions
from shardferry.errors import HandoffError
from shardferry.exchange.agreement import Agreement
from shardferry.handoff.handle import ShardHandle, make_handle
from shardferry.handoff.object_store import ObjectStore
from shardferry.layout.mesh import Mesh
from shardferry.layout.spec import Rule, SpecLayout
from shardferry.load import LoadedShard, LoadJob, load_rank
from shardferry.optimizer.loaded_state import LoadedState
from shardferry.plan.planner import ALIGNMENT
from tests.support.alone import save_alone
from tests.support.oracle import full_tensor
from tests.support.processes import forking
from tests.support.ranks import RankPool

SHAPES = {"even.weight": (48, 6), "seven.weight": (7, 11), "thirty.weight": (30, 4), "even.bias": (48,)}
GROUPS = [{"lr": 0.125, "params": list(SHAPES)}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by stock torch."""
    path = tmp_path_factory.mktemp("handoff") / "ckpt"
    state = {f: {"step": 3, "exp_avg": full_tensor(f, "exp_avg", shape)} for f, shape in SHAPES.items()}
    save_alone({"optim": {"state": state, "param_groups": GROUPS}}, path)
    return path


def load(path: Path, world_rank: int = 1, world_size: int = 4, *, stays_here: bool = False) -> LoadedShard:
    """One rank's share: rows of everything, but of `thirty.weight` columns."""
    layout = SpecLayout(
        Mesh((("dp", world_size),)), (Rule("thirty.*", {"dp": ShardOf(1)}),), default={"dp": ShardOf(0)}
    )
    rank, options = layout.rank(world_rank), ReadOptions(concurrency=4)
    job = LoadJob(
        open_checkpoint(path), rank, LoadRequest("optim"), torch.device("cpu"), options, stays_here=stays_here
    )
    return load_rank(job, Agreement(None))


def handle_of(loaded: LoadedShard, transport: str, *, exclusive: bool = True) -> ShardHandle:
    return make_handle(loaded.manifest, loaded.arena, transport, exclusive=exclusive)


def serve(pipe: Connection, path: Path, transport: str, exclusive: bool) -> None:
    """A loader: loads, sends its handle, and holds the arena until it is told to end."""
    loaded = load(path)
    pipe.send(handle_of(loaded, transport, exclusive=exclusive))
    pipe.recv()


@contextmanager
def loader(path: Path, transport: str = "shared_memory", *, exclusive: bool) -> Iterator[tuple[ShardHandle, int]]:
    """Another process that holds a loaded shard: its handle, and its process id."""
    context = forking()
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, path, transport, exclusive), daemon=True)
    process.start()
    try:
        assert ours.poll(90), "the loader sent no handle"
        assert process.pid is not None
        yield ours.recv(), process.pid
    finally:
        process.kill()
        process.join(10)
        ours.close()


def kill(pid: int) -> None:
    process = psutil.Process(pid)
    process.kill()
    process.wait(10)


def check(shard: LoadedState) -> int:
    """Every element of this shard against the oracle; returns how many."""
    compared = 0
    for fqn, entries in shard.state_dict()["state"].items():
        assert entries["step"] == 3
        whole = full_tensor(fqn, "exp_avg", shard.global_shape(fqn, "exp_avg"))
        for region, local in shard.regions(fqn, "exp_avg"):
            found = entries["exp_avg"][tuple(map(slice, local.offsets, local.ends))]
            assert torch.equal(found, whole[tuple(map(slice, region.offsets, region.ends))]), fqn
            compared += found.numel()
    return compared


SHARE = 12 * 6 + 2 * 11 + 30 * 1 + 12  # elements of rank 1 of 4


@pytest.mark.parametrize("exclusive", [False, True], ids=["shared", "exclusive"])
@pytest.mark.parametrize("transport", ["shared_memory", "object_store"])
def test_a_shard_of_another_process(checkpoint: Path, transport: str, exclusive: bool) -> None:
    with loader(checkpoint, transport, exclusive=exclusive) as (handle, pid):
        with handle.open() as shard:
            assert check(shard) == SHARE
            tensor = shard.state_dict()["state"]["even.bias"]["exp_avg"]
        kill(pid)
    tensor.add_(1)  # it may be written, and outlives the loader
    assert torch.equal(tensor, full_tensor("even.bias", "exp_avg", (48,))[12:24] + 1)


def test_object_store_bytes_travel_out_of_band(checkpoint: Path) -> None:
    handle, buffers = handle_of(load(checkpoint), "object_store"), []
    text = pickle.dumps(handle, protocol=5, buffer_callback=buffers.append)
    assert isinstance(handle.source, ObjectStore)
    assert [buffer.raw().nbytes for buffer in buffers] == [handle.source.nbytes]
    arrived = pickle.loads(text, buffers=[bytes(buffer.raw()) for buffer in buffers])
    with arrived.open() as one, arrived.open() as other:
        one.state_dict()["state"]["even.weight"]["exp_avg"].fill_(-1)
        assert check(other) == SHARE


def test_in_process_is_the_arena_itself_and_stays_here(checkpoint: Path) -> None:
    loaded = load(checkpoint)
    handle = handle_of(loaded, "in_process")
    with handle.open() as shard:
        assert check(shard) == SHARE
        shard.state_dict()["state"]["even.bias"]["exp_avg"].zero_()
    (bias,) = [t for t in loaded.plan.tensors if t.fqn == "even.bias"]
    assert loaded.arena.tensor(bias.arena_offset, (12,), torch.float32).tolist() == [0] * 12
    with pytest.raises(HandoffError, match="can't leave its process"):
        pickle.dumps(handle)
    with pytest.raises(HandoffError, match="the shard was closed; use it inside its `with`"):
        shard.state_dict()
    with pytest.raises(
        HandoffError,
        match="'pigeon' is not a transport; use in_process, shared_memory, cuda_ipc, object_store, collective or nixl",
    ):
        handle_of(loaded, "pigeon")


def test_views_are_aligned_and_a_frozen_arena_still_gives_private_pages(checkpoint: Path) -> None:
    loaded = load(checkpoint)
    arena = loaded.arena
    assert isinstance(arena, HostArena)
    views = [arena.tensor(t.arena_offset, t.layout.local_shape, t.dtype) for t in loaded.plan.tensors]
    assert [view.data_ptr() % ALIGNMENT for view in views] == [0] * len(SHAPES)
    first = views[0].flatten()[0].item()
    del views
    handle_of(loaded, "shared_memory", exclusive=False)
    with pytest.raises(PermissionError):
        mmap.mmap(arena.descriptor, arena.nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    pages = mmap.mmap(arena.descriptor, arena.nbytes, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    mine, place = torch.frombuffer(pages, dtype=torch.float32), loaded.plan.tensors[0].arena_offset // 4
    assert mine[place].item() == first
    mine[place] = -1
    others = mmap.mmap(arena.descriptor, arena.nbytes, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    assert torch.frombuffer(others, dtype=torch.float32)[place].item() == first


def dtensors(path: str) -> dict[str, Any]:
    """Placements, shape and values of each state tensor on a mesh of one rank."""
    with handle_of(load(Path(path), 0, 1), "in_process").open() as shard:
        state = shard.state_dict(init_device_mesh("cpu", (1,), mesh_dim_names=("dp",)))["state"]
        with pytest.raises(HandoffError, match=r"the mesh given has the sizes \(1, 1\)"):
            shard.state_dict(init_device_mesh("cpu", (1, 1)))
        assert all(isinstance(entries["exp_avg"], DTensor) for entries in state.values())
        return {
            f: (e["exp_avg"].placements, e["exp_avg"].stride(), e["exp_avg"].full_tensor()) for f, e in state.items()
        }


def test_dtensors_on_a_mesh(checkpoint: Path, ranks: RankPool) -> None:
    (found,) = ranks.run(1, dtensors, str(checkpoint))
    assert {fqn: placements for fqn, (placements, _, _) in found.items()} == {
        fqn: (TorchShard(1 if fqn == "thirty.weight" else 0),) for fqn in SHAPES
    }
    for fqn, shape in SHAPES.items():
        whole = full_tensor(fqn, "exp_avg", shape)
        assert found[fqn][1] == whole.stride()
        assert torch.equal(found[fqn][2], whole), fqn


def test_param_groups(checkpoint: Path) -> None:
    with handle_of(load(checkpoint), "object_store").open() as shard:
        assert [dict(group) for group in shard.param_groups] == GROUPS
        assert shard.state_dict()["param_groups"] == GROUPS
        assert set(shard.fqns) == set(SHAPES)
        assert {fqn: shard.global_shape(fqn, "exp_avg") for fqn in SHAPES} == SHAPES


def test_a_shard_that_stays_here_is_for_nobody_else(checkpoint: Path) -> None:
    loaded = load(checkpoint, stays_here=True)
    with pytest.raises(HandoffError, match="for its own process alone"):
        handle_of(loaded, "shared_memory")
    with handle_of(loaded, "in_process").open() as shard:
        assert check(shard) == SHARE
