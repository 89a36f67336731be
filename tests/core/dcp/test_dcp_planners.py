"""`shardferry.dcp`: anybody's reader and anybody's planner, also for tensors that are nested."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fsspec.implementations.memory import MemoryFileSystem
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, StorageReader
from torch.distributed.checkpoint._extension import ExtensionRegistry, ZStandard
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import _create_read_items
from torch.utils._python_dispatch import TorchDispatchMode

import shardferry.dcp as ours
from shardferry.dcp.load import has_ranges
from shardferry.errors import PlanError
from tests.support.alone import save_alone
from tests.support.damage import edit_metadata
from tests.support.models import SHAPES, STATES, STEP
from tests.support.oracle import full_tensor
from tests.support.ranks import RankPool
from tests.support.sharded import chunked, cut, mostly_elsewhere, nested, place_of_nested

MATRICES = {fqn: shape for fqn, shape in SHAPES.items() if len(shape) >= 2}


class CountingPlanner(DefaultLoadPlanner):
    """Somebody's own planner, with a flag that torch's own would heed."""

    num_plans = 0

    def create_local_plan(self) -> LoadPlan:
        self.num_plans += 1
        return super().create_local_plan()


class DoublingPlanner(DefaultLoadPlanner):
    """Somebody's planner that changes what it places: each tensor is doubled when it has arrived."""

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        tensor.mul_(2)


class PlannerFromScratch(LoadPlanner):
    """Somebody's planner that shares no code with torch's default one."""

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        self.state_dict, self.metadata = state_dict, metadata

    def create_local_plan(self) -> LoadPlan:
        saved = self.metadata.state_dict_metadata
        return LoadPlan(
            [item for key, value in self.state_dict.items() for item in _create_read_items(key, saved[key], value)]
        )

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        tensor = dcp.utils.find_state_dict_object(self.state_dict, read_item.dest_index)
        box = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return tensor[tuple(slice(start, start + length) for start, length in box)]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass


class CountingReader(FileSystemReader):
    """Somebody's own reader."""

    num_reads = 0

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Any:
        self.num_reads += len(plan.items)
        return super().read_data(plan, planner)


def load_nested(path: str, dim: int, tp: int, reader: type[StorageReader], planner: Any, factor: int) -> int:
    """Nested parameters of every shape; each element of the state against the oracle. Returns how many there were."""
    made = planner() if isinstance(planner, type) else planner
    model = {fqn: nested(shape, dim=dim, tp=tp) for fqn, shape in MATRICES.items()}
    loaded = ours.load_sharded_optimizer_state_dict(model, "optim", reader(path), made)
    if isinstance(made, CountingPlanner):
        assert made.num_plans == 1
    compared = 0
    for fqn, like in model.items():
        assert float(loaded["optim"]["state"][fqn]["step"]) == STEP * (
            factor if isinstance(made, DoublingPlanner) else 1
        )
        for name in STATES:
            value = loaded["optim"]["state"][fqn][name]
            (outer,) = like.local_shards()
            assert type(value) is ShardedTensor
            assert (value.size(), value._process_group) == (outer.tensor.size(), outer.tensor._process_group)
            full = full_tensor(fqn, name, MATRICES[fqn]) * factor
            for shard, region in zip(value.local_shards(), place_of_nested(like), strict=True):
                assert torch.equal(shard.tensor, cut(full, region)), f"{fqn}.{name} {region}"
                compared += shard.tensor.numel()
    assert loaded["optim"]["param_groups"][0]["lr"] == 0.125
    return compared


@pytest.mark.conformance(6)
@pytest.mark.parametrize(("dim", "tp", "world_size"), [(0, 2, 4), (1, 2, 4), (1, 3, 6), (0, 2, 8)])
def test_nested_tensors_without_a_planner(
    ranks: RankPool, saved_by: dict[int, Path], dim: int, tp: int, world_size: int
) -> None:
    compared = ranks.run(world_size, load_nested, str(saved_by[3]), dim, tp, FileSystemReader, None, 1)
    assert sum(compared) == 2 * sum(torch.Size(shape).numel() for shape in MATRICES.values())


@pytest.mark.conformance(6)
@pytest.mark.parametrize(
    ("reader", "planner", "factor"),
    [
        (FileSystemReader, CountingPlanner, 1),
        (FileSystemReader, DefaultLoadPlanner(allow_partial_load=True), 1),
        (FileSystemReader, DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False), 1),
        (FileSystemReader, CountingPlanner(flatten_state_dict=False, flatten_sharded_tensors=False), 1),
        (FileSystemReader, CountingPlanner(flatten_state_dict=False), 1),
        (FileSystemReader, DoublingPlanner, 2),
        (FileSystemReader, PlannerFromScratch, 1),
        (CountingReader, None, 1),
        (CountingReader, DefaultLoadPlanner, 1),
        (FsspecReader, CountingPlanner, 1),
        (FsspecReader, None, 1),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_nested_tensors_by_any_reader_and_planner(
    ranks: RankPool, saved_by: dict[int, Path], reader: Any, planner: Any, factor: int
) -> None:
    compared = ranks.run(4, load_nested, str(saved_by[3]), 1, 2, reader, planner, factor)
    assert sum(compared) == 2 * sum(torch.Size(shape).numel() for shape in MATRICES.values())


def save_by_hugging_face(path: str) -> None:
    state = {
        f"optim.state.{fqn}.{name}": full_tensor(fqn, name, shape) for fqn, shape in SHAPES.items() for name in STATES
    }
    dcp.save(state, storage_writer=HuggingFaceStorageWriter(path))


def load_by_hugging_face(path: str, planner: Any) -> int:
    world = dist.group.WORLD
    model = {fqn: chunked(shape, world) for fqn, shape in SHAPES.items()}
    reader = HuggingFaceStorageReader(path)
    loaded = ours.load_sharded_optimizer_state_dict(model, "optim", reader, planner)
    compared = 0
    for fqn, shape in SHAPES.items():
        for name in STATES:
            full = full_tensor(fqn, name, shape)
            for shard in loaded["optim"]["state"][fqn][name].local_shards():
                start = shard.metadata.shard_offsets[0]
                assert torch.equal(shard.tensor, full[start : start + shard.metadata.shard_sizes[0]])
                compared += shard.tensor.numel()
    return compared


@pytest.mark.parametrize("planner", [None, DefaultLoadPlanner()], ids=["no-planner", "default-planner"])
def test_hugging_face_reader(ranks: RankPool, tmp_path: Path, planner: Any) -> None:
    ranks.run(1, save_by_hugging_face, str(tmp_path))
    compared = ranks.run(3, load_by_hugging_face, str(tmp_path), planner)
    assert sum(compared) == 2 * sum(torch.Size(shape).numel() for shape in SHAPES.values())


class Allocations(TorchDispatchMode):
    """The most elements of any fp32 tensor that comes out of any operation; torch's messages are tensors of bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
            self.most = max(self.most, out.numel())
        return out


class ReaderOfObjects(FileSystemReader):
    """Reads no tensors: what is allocated is then what the face itself allocates."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Any:
        return super().read_data(LoadPlan([i for i in plan.items if i.type == LoadItemType.BYTE_IO]), planner)


def most_elements_allocated(path: str, where: str) -> int:
    fqn, shape = "even.weight", SHAPES["even.weight"]
    like = nested(shape, dim=1, tp=2) if where == "nested" else chunked(shape, dist.group.WORLD)
    with Allocations() as allocations:
        model = {} if where == "unknown" else {fqn: like}
        ours.load_sharded_optimizer_state_dict(model, "optim", ReaderOfObjects(path), CountingPlanner())
    return allocations.most


@pytest.mark.parametrize("where", ["known", "unknown", "nested"])
def test_no_whole_tensor_is_allocated(ranks: RankPool, saved_by: dict[int, Path], where: str) -> None:
    """The biggest tensor has 288 elements, of which each of 4 ranks holds 72."""
    assert ranks.run(4, most_elements_allocated, str(saved_by[2]), where) == [72] * 4


ROWS, COLUMNS = 2**40, 64  # 256 TiB of fp32, of which the first 16 rows are there


def make_enormous(path: Path) -> None:
    """The first rows are saved; the rest is in the metadata only."""
    key = "optim.state.huge.exp_avg"
    first = full_tensor("huge", "exp_avg", (16, COLUMNS))
    save_alone({"optim": {"state": {"huge": {"exp_avg": first}}}}, path)

    def edit(metadata: Any) -> None:
        saved = metadata.state_dict_metadata[key]
        saved.size = torch.Size((ROWS, COLUMNS))
        saved.chunks.append(ChunkStorageMetadata(torch.Size((16, 0)), torch.Size((ROWS - 16, COLUMNS))))
        metadata.storage_data[MetadataIndex(key, (16, 0))] = _StorageInfo("elsewhere.distcp", 0, ROWS * COLUMNS * 4)

    edit_metadata(path, edit)


def load_enormous(path: str, reader: type[FileSystemReader], planner: Any) -> None:
    rank = dist.get_rank()
    rows = (8 * rank, 8 * rank + 8)
    rest = [((0, 0), (rows[0], COLUMNS)), ((rows[1], 0), (ROWS - rows[1], COLUMNS))]
    like = mostly_elsewhere((ROWS, COLUMNS), ((rows[0], 0), (8, COLUMNS)), [box for box in rest if box[1][0]])
    loaded = ours.load_sharded_optimizer_state_dict({"huge": like}, "optim", reader(path), planner)
    value = loaded["optim"]["state"]["huge"]["exp_avg"]
    assert value.size() == (ROWS, COLUMNS)
    (shard,) = value.local_shards()
    assert torch.equal(shard.tensor, full_tensor("huge", "exp_avg", (16, COLUMNS))[slice(*rows)])


@pytest.mark.parametrize("reader", [FileSystemReader, CountingReader])
def test_a_tensor_that_no_memory_holds(ranks: RankPool, tmp_path: Path, reader: Any) -> None:
    make_enormous(tmp_path / "ckpt")
    ranks.run(2, load_enormous, str(tmp_path / "ckpt"), reader, None)


class CountingFileSystem(MemoryFileSystem):
    """Files in this process's memory; counts the bytes that are read."""

    protocol = "counting"
    num_bytes = 0

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        data: bytes = super().cat_file(path, start, end, **options)
        CountingFileSystem.num_bytes += len(data)
        return data


def test_fsspec_reader_is_read_in_ranges(tmp_path: Path) -> None:
    """One chunk of 4 MiB is saved, 1/16 of it is wanted."""
    fsspec.register_implementation("counting", CountingFileSystem, clobber=True)
    full = full_tensor("big", "exp_avg", (1024, 1024))
    save_alone(
        {"optim": {"state": {"big": {"exp_avg": full}}}},
        "counting://ckpt",
        storage_writer=FsspecWriter("counting://ckpt"),
    )
    store = dist.FileStore(str(tmp_path / "rendezvous"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        like = mostly_elsewhere((1024, 1024), ((64, 0), (64, 1024)), [((0, 0), (64, 1024)), ((128, 0), (896, 1024))])
        before = CountingFileSystem.num_bytes
        loaded = ours.load_sharded_optimizer_state_dict({"big": like}, "optim", FsspecReader("counting://ckpt"))
    finally:
        dist.destroy_process_group()
    (shard,) = loaded["optim"]["state"]["big"]["exp_avg"].local_shards()
    assert torch.equal(shard.tensor, full[64:128])
    assert 64 * 1024 * 4 <= CountingFileSystem.num_bytes - before < 64 * 1024 * 4 + 16 * 1024


class OwnExtension(ZStandard):
    """Somebody's own way to undo what a writer did."""

    @staticmethod
    def registry_name() -> str:
        return "own"


def test_which_readers_are_read_in_ranges(tmp_path: Path) -> None:
    registry = ExtensionRegistry()
    assert has_ranges(FileSystemReader(tmp_path, _extension_registry=registry))
    registry.register(OwnExtension)
    assert not has_ranges(FileSystemReader(tmp_path, _extension_registry=registry))
    assert not has_ranges(CountingReader(tmp_path))
    assert not has_ranges(HuggingFaceStorageReader(str(tmp_path)))


class ForgetfulPlanner(DefaultLoadPlanner):
    """Loads no Python object."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        pass


def load_forgetfully(path: str) -> None:
    with pytest.raises(PlanError, match=r"optim\.param_groups\.\S+: ForgetfulPlanner left out this Python object"):
        ours.load_sharded_optimizer_state_dict({}, "optim", FileSystemReader(path), ForgetfulPlanner())


def test_objects_that_a_planner_leaves_out(ranks: RankPool, saved_by: dict[int, Path]) -> None:
    ranks.run(2, load_forgetfully, str(saved_by[2]))


class RecordingPlanner(DefaultLoadPlanner):
    """Remembers the keys that it was given."""

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        self.given = {key: value if isinstance(value, str) else type(value) for key, value in state_dict.items()}
        super().set_up_planner(state_dict, metadata, is_coordinator)


def planner_sees(path: str) -> dict[str, Any]:
    planner = RecordingPlanner()
    model = {fqn: nested(shape, dim=0, tp=2) for fqn, shape in MATRICES.items()}
    ours.load_sharded_optimizer_state_dict(model, "optim", FileSystemReader(path), planner)
    return planner.given


def test_what_a_planner_is_given(ranks: RankPool, saved_by: dict[int, Path]) -> None:
    """The optimizer's keys of the checkpoint, flat; tensors where tensors go."""
    saved = pickle.loads((saved_by[2] / ".metadata").read_bytes()).state_dict_metadata
    for given in ranks.run(2, planner_sees, str(saved_by[2])):
        assert given.keys() == {key for key in saved if key.startswith("optim.")}
        assert given["optim.state.even.weight.exp_avg"] is ShardedTensor
        assert given["optim.state.even.weight.step"] is torch.Tensor
        assert given["optim.param_groups.0.lr"] == "<bytes_io>"
