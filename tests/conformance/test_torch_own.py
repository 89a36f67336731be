"""What PyTorch's own tests of this function assert, in our words, with the import changed.

Sources, under test/distributed/checkpoint/ of pytorch/pytorch: test_fsdp_optim_state.py, test_fsspec.py, test_planner.py,
test_optimizer.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import ShardingStrategy, StateDictType

import shardferry.dcp as ours
from shardferry.errors import PlanError
from tests.support.ranks import RankPool
from tests.support.sharded import mostly_elsewhere

# --- test_fsdp_optim_state.py, test_fsspec.py ------------------------------------------------------------------------


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7, bias=False), nn.ReLU(), nn.Linear(7, 3))


def trained(seed: int) -> tuple[FSDP, torch.optim.Optimizer]:
    """FULL_SHARD and Adam, after one step on this rank's own data."""
    model = FSDP(net(), sharding_strategy=ShardingStrategy.FULL_SHARD, device_id=torch.device("cpu"))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    torch.manual_seed(seed + dist.get_rank())
    model(torch.rand(4, 5)).sum().backward()
    optimizer.step()
    return model, optimizer


def full_state(model: FSDP, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    with FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT):
        return FSDP.optim_state_dict(model, optimizer)


def round_trip(path: str, writer: Any, reader: Any, planner: Any) -> None:
    model, optimizer = trained(1)
    with FSDP.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
        state = {"model": model.state_dict(), "optim": FSDP.optim_state_dict(model, optimizer)}
        dcp.save(state, storage_writer=writer(path), planner=DefaultSavePlanner() if planner else None)
    other, its_optimizer = trained(2)
    before = full_state(other, its_optimizer)["state"]
    with FSDP.state_dict_type(other, StateDictType.SHARDED_STATE_DICT):
        loaded = ours.load_sharded_optimizer_state_dict(
            model_state_dict=other.state_dict(),
            optimizer_key="optim",
            storage_reader=reader(path),
            planner=DefaultLoadPlanner() if planner else None,
        )
        its_optimizer.load_state_dict(FSDP.optim_state_dict_to_load(other, its_optimizer, loaded["optim"]))
    saved, found = full_state(model, optimizer), full_state(other, its_optimizer)
    assert found["param_groups"] == saved["param_groups"]
    assert found["state"].keys() == saved["state"].keys()
    for fqn, entries in saved["state"].items():
        for name, value in entries.items():
            assert torch.equal(found["state"][fqn][name], value), f"{fqn}.{name}"
    if dist.get_rank() == 0:  # the full state dict stands on rank 0 only
        assert not torch.equal(before["0.weight"]["exp_avg"], saved["state"]["0.weight"]["exp_avg"])


@pytest.mark.parametrize("pass_planner", [True, False])
def test_load_sharded_optimizer_state_dict(ranks: RankPool, tmp_path: Path, pass_planner: bool) -> None:
    """test_fsdp_optim_state.py: FSDP FULL_SHARD and Adam, saved and loaded on as many ranks."""
    ranks.run(2, round_trip, str(tmp_path / "ckpt"), FileSystemWriter, FileSystemReader, pass_planner)


@pytest.mark.parametrize("pass_planner", [True, False])
def test_through_fsspec(ranks: RankPool, tmp_path: Path, pass_planner: bool) -> None:
    """test_fsspec.py: the same through fsspec's reader and writer."""
    ranks.run(2, round_trip, f"file://{tmp_path / 'ckpt'}", FsspecWriter, FsspecReader, pass_planner)


# --- test_planner.py -------------------------------------------------------------------------------------------------
#
# A tensor of one dimension, saved in equal shards; one rank of the loading job wants a piece of it. Torch's tests assert
# where each read begins in the saved shard, where it goes in the wanted one, and how long it is.

Read = tuple[int, int, int]  # storage_offset, dest_offset, length


def plan_reads(length: int, num_saved: int, piece: tuple[int, int], offset: int | None) -> list[Read]:
    """The plan for the elements ``piece`` of a tensor that was saved in ``num_saved`` shards.

    Args:
        offset: where the tensor that is wanted begins in the saved one; None: the wanted one is as long.
    """
    rows = length // num_saved
    chunks = [ChunkStorageMetadata(torch.Size([rows * i]), torch.Size([rows])) for i in range(num_saved)]
    saved = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size([length]), chunks)
    begin, end = piece
    shift = offset or 0
    size = length - shift
    rest = [(0, begin - shift), (end - shift, size - (end - shift))]
    value = mostly_elsewhere((size,), ((begin - shift,), (end - begin,)), [((o,), (n,)) for o, n in rest if n])
    planner = ours.ReaderWithOffset({} if offset is None else {"tensor": (offset,)})
    planner.set_up_planner({"tensor": value}, Metadata({"tensor": saved}), is_coordinator=True)
    items = planner.create_local_plan().items
    for item in items:
        assert planner.lookup_tensor(item.dest_index).data_ptr() == value.local_shards()[0].tensor.data_ptr()
    return sorted(map(_numbers, items))


def _numbers(item: ReadItem) -> Read:
    ((storage,), (dest,), (length,)) = item.storage_offsets, item.dest_offsets, item.lengths
    return storage, dest, length


@pytest.mark.conformance(2)
@pytest.mark.parametrize("offset", [None, 2], ids=["in-place", "at-an-offset"])
@pytest.mark.parametrize(
    ("length", "num_saved", "piece", "expected"),
    [
        pytest.param(128, 8, (32, 64), [(0, 0, 16), (0, 16, 16)], id="8-to-4"),
        pytest.param(128, 4, (16, 32), [(16, 0, 16)], id="4-to-8"),
        pytest.param(120, 4, (40, 80), [(0, 20, 20), (10, 0, 20)], id="4-to-3"),
        pytest.param(16, 2, (4, 11), [(0, 4, 3), (4, 0, 4)], id="4-to-11-of-two-8s"),
    ],
)
def test_exact_plans(
    ranks: RankPool, length: int, num_saved: int, piece: tuple[int, int], expected: list[Read], offset: int | None
) -> None:
    """test_planner.py: test_load_with_resharding, test_load_with_world_size_diff_by_one, test_local_load_plan."""
    assert ranks.run(1, plan_reads, length, num_saved, piece, offset) == [expected]


def plan_missing_key(allow_partial_load: bool) -> int:
    planner = ours.ReaderWithOffset({}, allow_partial_load=allow_partial_load)
    saved = create_metadata({"one": torch.zeros(3)})
    planner.set_up_planner({"one": torch.zeros(3), "two": torch.zeros(3)}, saved, is_coordinator=True)
    return len(planner.create_local_plan().items)


def create_metadata(state_dict: dict[str, Any]) -> Metadata:
    """What torch's own save planner makes of a state dict."""
    planner = DefaultSavePlanner()
    planner.set_up_planner(state_dict, is_coordinator=True)
    _, metadata = planner.create_global_plan([planner.create_local_plan()])
    return metadata


def test_strict_and_partial_load() -> None:
    """test_planner.py: test_strict, test_partial_load."""
    with pytest.raises(PlanError, match="two: is not in the checkpoint, which has 1 keys"):
        plan_missing_key(allow_partial_load=False)
    assert plan_missing_key(allow_partial_load=True) == 1


def test_size_mismatch_raises() -> None:
    """test_planner.py: test_load_different_sizes_throws."""
    planner = ours.ReaderWithOffset({})
    planner.set_up_planner({"one": torch.zeros(4)}, create_metadata({"one": torch.zeros(3)}), is_coordinator=True)
    with pytest.raises(ValueError, match=r"size mismatch: \(3,\) is saved, \(4,\) is wanted"):
        planner.create_local_plan()


# --- test_optimizer.py -----------------------------------------------------------------------------------------------


class Accelerators:
    """Stands for a machine with accelerators: what torch's device modules answer there."""

    def __init__(self, num_devices: int) -> None:
        self._num_devices = num_devices

    def is_available(self) -> bool:
        return self._num_devices > 0

    def device_count(self) -> int:
        return self._num_devices


@pytest.mark.parametrize(
    ("rank", "num_devices", "expected"),
    [(0, 4, "cuda:0"), (3, 4, "cuda:3"), (5, 4, "cuda:1"), (7, 1, "cuda:0"), (3, 0, "cpu")],
)
def test_gen_rank_device(monkeypatch: pytest.MonkeyPatch, rank: int, num_devices: int, expected: str) -> None:
    """test_optimizer.py: the device is the rank modulo the devices of a machine; the CPU where there are none."""
    monkeypatch.setattr(torch, "get_device_module", lambda _: Accelerators(num_devices))
    assert ours._gen_rank_device(rank, "cuda") == expected
    assert ours._gen_rank_device(rank, "cpu") == "cpu"
