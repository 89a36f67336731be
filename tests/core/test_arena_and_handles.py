"""Arenas and handles: who may write, how long memory lives, what is left behind."""

from __future__ import annotations

import mmap
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from shardferry import errors
from shardferry.arena import NAME, HostArena, available_host_bytes, check_host_room
from shardferry.errors import ArenaError, HandoffError, RankError, ShardferryError
from shardferry.handoff.handle import ShardHandle, make_handle
from shardferry.layout.tensor_layout import replicated
from shardferry.plan.load_plan import Manifest, PlannedTensor, PlannedValue
from tests.support.leftovers import no_shared_files_left, wait_while

SHAPE = (3, 5)
CONTENT = torch.arange(15.0).view(SHAPE)


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:shardferry-arena")


def manifest() -> Manifest:
    return Manifest(
        world_rank=0,
        world_size=1,
        mesh=None,
        tensors=(
            PlannedTensor(
                key="optim.state.w.exp_avg",
                fqn="w",
                path=("exp_avg",),
                dtype=torch.float32,
                layout=replicated(SHAPE),
                arena_offset=256,
            ),
        ),
        values=(PlannedValue("optim.state.w.step", "w", ("step",), 3),),
        param_groups=({"params": ["w"], "lr": 0.5},),
        fqns=("w",),
    )


def filled_arena() -> HostArena:
    arena = HostArena(512)
    arena.tensor(256, SHAPE, torch.float32).copy_(CONTENT)
    return arena


def test_memory_lives_as_long_as_a_tensor_uses_it() -> None:
    before = mappings()
    with no_shared_files_left():
        arena = filled_arena()
        tensor = arena.tensor(256, SHAPE, torch.float32)
        arena.close()
        assert torch.equal(tensor, CONTENT)
        assert mappings() == before + 1
        del tensor, arena
        assert mappings() == before


def test_an_arena_for_its_own_process_alone_is_no_file() -> None:
    shared = HostArena(512, num_places=3)
    assert NAME in str(Path(f"/proc/self/fd/{shared.descriptor}").readlink())
    assert shared.is_shareable
    descriptors = set(Path("/proc/self/fd").iterdir())
    arena = HostArena(512, is_shareable=False)
    assert not arena.is_shareable
    assert set(Path("/proc/self/fd").iterdir()) <= descriptors
    tensor = arena.tensor(256, SHAPE, torch.float32)
    assert not tensor.any()
    tensor.copy_(CONTENT)
    arena.close()
    assert torch.equal(tensor, CONTENT)


def test_a_frozen_arena_is_immutable_for_everybody() -> None:
    arena = filled_arena()
    arena.freeze()
    with pytest.raises(PermissionError):
        mmap.mmap(arena.descriptor, 512, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(PermissionError):
        os.pwrite(arena.descriptor, b"x", 0)


def test_a_frozen_arena_is_no_longer_mapped_here() -> None:
    def is_mapped() -> bool:
        return f" {inode} " in Path("/proc/self/maps").read_text()

    arena = filled_arena()
    inode = os.fstat(arena.descriptor).st_ino
    assert is_mapped()
    arena.freeze()
    wait_while(is_mapped)
    assert not is_mapped()


def test_an_empty_arena() -> None:
    assert HostArena(0).tensor(0, (0, 4), torch.float32).shape == (0, 4)


def test_no_room() -> None:
    with pytest.raises(
        ArenaError, match=r"host here: 2 arena\(s\) need 700 bytes, 600 are available: 100 bytes are missing"
    ):
        check_host_room([300, 400], available_bytes=600, host="here")
    check_host_room([300, 400], available_bytes=700, host="here")
    with pytest.raises(
        ArenaError,
        match=r"700 bytes, 800 are available, of which handoff.keep.memory_fraction = 0.5 allows 400: 300 bytes are missing",
    ):
        check_host_room([300, 400], available_bytes=800, host="here", fraction=0.5)
    check_host_room([300, 400], available_bytes=1400, host="here", fraction=0.5)


def test_what_a_host_has_is_what_its_kernel_says() -> None:
    assert 0 < available_host_bytes() < 1 << 50


def test_object_store_bytes_travel_out_of_band_and_are_copied_once() -> None:
    buffers: list[pickle.PickleBuffer] = []
    sent = make_handle(manifest(), filled_arena(), "object_store", exclusive=True)
    text = pickle.dumps(sent, protocol=5, buffer_callback=buffers.append)
    assert [buffer.raw().nbytes for buffer in buffers] == [512]
    shared = np.frombuffer(bytes(buffers[0].raw()), np.uint8)  # read-only, as an object store gives it
    handle: ShardHandle = pickle.loads(text, buffers=[shared])
    with handle.open() as shard:
        tensor = shard.state_dict()["state"]["w"]["exp_avg"]
        tensor.add_(1)
    with handle.open() as shard:
        assert torch.equal(shard.state_dict()["state"]["w"]["exp_avg"], CONTENT)


def test_what_a_shard_tells() -> None:
    handle = make_handle(manifest(), filled_arena(), "object_store", exclusive=True)
    with handle.open() as shard:
        assert shard.state_dict()["param_groups"] == [{"params": ["w"], "lr": 0.5}]
        assert shard.state_dict()["state"]["w"]["step"] == 3
        assert shard.global_shape("w", "exp_avg") == SHAPE
        assert [(str(whole), str(local)) for whole, local in shard.regions("w", "exp_avg")] == [("[0:3, 0:5]",) * 2]
        with pytest.raises(KeyError, match="no state tensor 'step'"):
            shard.regions("w", "step")
    with pytest.raises(HandoffError, match="was closed"):
        shard.state_dict()


def test_every_error_survives_pickling() -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, ShardferryError)]
    assert len(classes) > 10
    for error in classes:
        again = pickle.loads(pickle.dumps(error("w: 3 of 4")))
        assert (type(again), str(again)) == (error, "w: 3 of 4")
    assert pickle.loads(pickle.dumps(RankError("late", (1, 2)))).world_ranks == (1, 2)
