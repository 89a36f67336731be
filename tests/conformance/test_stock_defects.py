"""Each defect of torch's own load path: torch shown wrong, and Shardferry right or loud in the same place.

The numbers B1 to B19 are those of the list of defects that Shardferry was made against. A test that fails in its first half
says that torch has mended the defect: then it is to be asserted by version.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.optimizer as stock
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    _version,
)
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.checkpoint.utils import _ReaderView
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import ShardingStrategy, StateDictType
from torch.distributed.tensor import DTensor

import shardferry.dcp as ours
from shardferry import open_checkpoint
from shardferry.errors import PlanError, ShardferryError
from shardferry.read.zip_header import HEADER_BYTES, parse_header
from shardferry.storage.open import open_storage
from tests.support.alone import save_alone
from tests.support.damage import KEY, hole
from tests.support.models import Model, fill_state, fsdp2
from tests.support.oracle import full_tensor
from tests.support.ranks import RankPool
from tests.support.sharded import chunked, cut, nested, place_of_nested, sharded

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning",
    "ignore:`_get_pg_default_device` will be deprecated:UserWarning",
    "ignore:Multiple backends are registered with this ProcessGroup:UserWarning",
    "ignore:`load_state_dict` is deprecated:FutureWarning",
    "ignore:Please use DTensor instead and we are deprecating ShardedTensor:FutureWarning",
)

Loader = Any  # stock's load_sharded_optimizer_state_dict, or ours
STOCK, OURS = stock.load_sharded_optimizer_state_dict, ours.load_sharded_optimizer_state_dict
EVEN = full_tensor("even.weight", "exp_avg", (48, 6))


@pytest.fixture
def job(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    store = dist.FileStore(str(tmp_path / "rendezvous"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def save_even(path: Path, **options: Any) -> None:
    """One parameter's state and its group."""
    state = {"even.weight": {"exp_avg": EVEN, "step": torch.tensor(7.0)}}
    save_alone({"optim": {"state": state, "param_groups": [{"lr": 0.5, "params": ["even.weight"]}]}}, path, **options)


def moment(loaded: dict[str, Any], name: str = "exp_avg") -> Any:
    return loaded["optim"]["state"]["even.weight"][name]


def only_local(value: ShardedTensor) -> torch.Tensor:
    (shard,) = value.local_shards()
    return shard.tensor


# --- B1: HSDP --------------------------------------------------------------------------------------------------------


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(16, 4))

    def forward(self) -> torch.Tensor:
        return self.weight.sum()


def load_hsdp(path: str, load: Loader) -> torch.Tensor:
    """Two replicas of two shards; the moments that FSDP1 then has, gathered by FSDP1 itself."""
    model = FSDP(
        Line(),
        use_orig_params=True,
        device_id=torch.device("cpu"),
        device_mesh=init_device_mesh("cpu", (2, 2)),
        sharding_strategy=ShardingStrategy.HYBRID_SHARD,
    )
    optimizer = torch.optim.Adam(model.parameters())
    with FSDP.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
        loaded = load(model.state_dict(), "optim", FileSystemReader(path))
        flat = FSDP.optim_state_dict_to_load(model, optimizer, loaded["optim"])
    optimizer.load_state_dict(flat)
    (state,) = optimizer.state.values()
    return state["exp_avg"]


@pytest.mark.defect("B1")
def test_b1_hsdp(ranks: RankPool, tmp_path: Path) -> None:
    """Stock shards over the world what FSDP1 gathers within a replica: half of the state is lost without a word."""
    full = full_tensor("weight", "exp_avg", (16, 4))
    state = {"weight": {"exp_avg": full, "exp_avg_sq": full, "step": torch.tensor(7.0)}}
    group = torch.optim.Adam([torch.zeros(1)]).state_dict()["param_groups"][0] | {"params": ["weight"]}
    save_alone({"optim": {"state": state, "param_groups": [group]}}, tmp_path / "ckpt")

    wrong = ranks.run(4, load_hsdp, str(tmp_path / "ckpt"), STOCK)
    assert sum(int((local == 0).sum()) for local in wrong[:2]) == full.numel() // 2
    assert not torch.equal(wrong[0], wrong[2])  # and the replicas differ

    right = ranks.run(4, load_hsdp, str(tmp_path / "ckpt"), OURS)
    for replica in (right[:2], right[2:]):
        assert torch.equal(torch.cat(replica), full.view(-1))


# --- B2, B12, B13, B14: tensor-parallel slices, sharded again ----------------------------------------------------------


def load_nested(path: str, load: Loader, tp_inside: bool = True) -> str:
    """In the words of the error, or `right`."""
    like = nested((48, 6), dim=0, tp=2, tp_inside=tp_inside)
    try:
        value = moment(load({"even.weight": like}, "optim", FileSystemReader(path)))
    except BaseException as error:  # torch's CheckpointException is no Exception
        return f"{type(error).__name__}: {error}"
    assert torch.equal(only_local(value), cut(EVEN, place_of_nested(like)[0]))
    return "right"


@pytest.mark.defect("B2")
def test_b2_groups_that_do_not_begin_at_rank_0(ranks: RankPool, tmp_path: Path) -> None:
    """Stock places shards by ranks of the data-parallel group, where ShardedTensor wants ranks of the job."""
    save_even(tmp_path / "ckpt")
    for message in ranks.run(4, load_nested, str(tmp_path / "ckpt"), STOCK):
        assert "does not exist in input process group" in message
    assert ranks.run(4, load_nested, str(tmp_path / "ckpt"), OURS) == ["right"] * 4


@pytest.mark.defect("B2")
def test_b2_the_group_that_does(ranks: RankPool, tmp_path: Path) -> None:
    """The ranks 2 and 3 fail alone, outside what stock reports to all. 0 and 1 wait for them, here until they are gone."""
    save_even(tmp_path / "ckpt")
    messages = ranks.run(4, load_nested, str(tmp_path / "ckpt"), STOCK, False)
    assert all("does not exist in input process group" in message for message in messages[2:])
    assert not any("does not exist in input process group" in message for message in messages[:2])
    assert all(message != "right" for message in messages[:2])
    assert ranks.run(4, load_nested, str(tmp_path / "ckpt"), OURS, False) == ["right"] * 4


@pytest.mark.defect("B12")
def test_b12_flattened_keys_of_nested_tensors(job: None, tmp_path: Path) -> None:
    """Stock takes the third component of a path that has two."""
    model = Model({"even.weight": (48, 6)})
    optimizer = torch.optim.AdamW(model.parameters())
    fill_state(model, optimizer)
    flat = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    dcp.save({"optim": flat}, checkpoint_id=str(tmp_path / "ckpt"))
    like = {"even.weight": nested((48, 6), dim=0, tp=1)}
    with pytest.raises(IndexError):
        STOCK(like, "optim", FileSystemReader(tmp_path / "ckpt"))
    loaded = OURS(like, "optim", FileSystemReader(tmp_path / "ckpt"))
    assert torch.equal(only_local(loaded["optim"]["state.even.weight.exp_avg"]), EVEN)


@pytest.mark.defect("B13")
def test_b13_state_of_another_shape_than_its_parameter(job: None, tmp_path: Path) -> None:
    """Stock gives each state of a nested parameter the parameter's shape: Adafactor's rows become a matrix of memory."""
    row = full_tensor("even.weight", "row", (48, 1))
    save_alone({"optim": {"state": {"even.weight": {"exp_avg": EVEN, "row": row}}}}, tmp_path / "ckpt")
    like = {"even.weight": nested((48, 6), dim=0, tp=1)}
    assert moment(STOCK(like, "optim", FileSystemReader(tmp_path / "ckpt")), "row").size() == (48, 6)
    loaded = OURS(like, "optim", FileSystemReader(tmp_path / "ckpt"))
    assert torch.equal(moment(loaded, "row"), row)
    assert torch.equal(only_local(moment(loaded)), EVEN)


class CountingPlanner(DefaultLoadPlanner):
    num_plans = 0

    def create_local_plan(self) -> LoadPlan:
        self.num_plans += 1
        return super().create_local_plan()


@pytest.mark.defect("B14")
def test_b14_the_callers_planner(job: None, tmp_path: Path) -> None:
    """Stock drops the planner where a tensor is nested, and its own has neither checks nor several shards."""
    save_even(tmp_path / "ckpt")
    like = {"even.weight": nested((48, 6), dim=0, tp=1)}
    planner = CountingPlanner()
    STOCK(like, "optim", FileSystemReader(tmp_path / "ckpt"), planner)
    assert planner.num_plans == 0
    loaded = OURS(like, "optim", FileSystemReader(tmp_path / "ckpt"), planner)
    assert planner.num_plans == 1
    assert torch.equal(only_local(moment(loaded)), EVEN)


@pytest.mark.defect("B14")
def test_b14_reader_with_offset(job: None, tmp_path: Path) -> None:
    """A missing key is a bare KeyError, another size is read as it comes, two local shards are an AssertionError."""
    save_even(tmp_path / "ckpt")
    reader, key = FileSystemReader(tmp_path / "ckpt"), "optim.state.even.weight.exp_avg"
    metadata = reader.read_metadata()

    def plan(planner: DefaultLoadPlanner, state_dict: dict[str, Any]) -> LoadPlan:
        planner.set_up_planner(state_dict, metadata, is_coordinator=True)
        return planner.create_local_plan()

    missing, smaller = {"missing": torch.zeros(3)}, {key: torch.zeros(4, 6)}
    two = {key: sharded((24, 6), {0: [((0, 0), (8, 6)), ((8, 0), (16, 6))]})}
    with pytest.raises(KeyError):
        plan(stock._ReaderWithOffset({}), missing)
    assert len(plan(stock._ReaderWithOffset({}), smaller).items) == 1
    with pytest.raises(AssertionError):
        plan(stock._ReaderWithOffset({key: (24, 0)}), two)

    with pytest.raises(PlanError, match="missing: is not in the checkpoint"):
        plan(ours.ReaderWithOffset({}), missing)
    with pytest.raises(PlanError, match=r"size mismatch: \(48, 6\) is saved, \(4, 6\) is wanted"):
        plan(ours.ReaderWithOffset({}), smaller)
    dcp.load(two, storage_reader=reader, planner=ours.ReaderWithOffset({key: (24, 0)}))
    assert torch.equal(torch.cat([shard.tensor for shard in two[key].local_shards()]), EVEN[24:])


# --- B3 to B7: keys and holes ------------------------------------------------------------------------------------------


@pytest.mark.defect("B3")
def test_b3_holes(ranks: RankPool, job: None, tmp_path: Path) -> None:
    """One saved chunk is gone from the metadata: stock leaves that part of the memory as it was."""
    ranks.run(2, save_halves, str(tmp_path / "ckpt"))
    hole(tmp_path / "ckpt")
    found = {KEY: torch.full((48, 6), torch.nan)}
    dcp.load(found, checkpoint_id=str(tmp_path / "ckpt"))
    assert int(found[KEY].isnan().sum()) == 24 * 6
    for planner in (None, CountingPlanner()):
        with pytest.raises(
            PlanError, match=r"144 of 288 wanted elements are in no saved chunk, first at \[24:48, 0:6\]"
        ):
            OURS({}, "optim", FileSystemReader(tmp_path / "ckpt"), planner)


def save_halves(path: str) -> None:
    rank = dist.get_rank()
    value = chunked((48, 6), dist.group.WORLD)
    only_local(value).copy_(EVEN[24 * rank : 24 * rank + 24])
    dcp.save({"optim": {"state": {"even.weight": {"exp_avg": value}}}}, checkpoint_id=path)


@pytest.mark.defect("B4")
def test_b4_wrong_optimizer_key(job: None, tmp_path: Path) -> None:
    """Stock loads nothing and says nothing."""
    save_even(tmp_path / "ckpt")
    assert STOCK({}, "optimizer", FileSystemReader(tmp_path / "ckpt")) == {}
    with pytest.raises(PlanError, match="nothing is saved under optimizer_key 'optimizer'; top-level keys are 'optim'"):
        OURS({}, "optimizer", FileSystemReader(tmp_path / "ckpt"))


def save_without_paths(path: Path) -> None:
    """planner_data is None."""
    saved = {"optim.state.even.weight.exp_avg": EVEN, "optim.state.even.weight.step": torch.tensor(7.0)}
    save_alone(saved, path, planner=DefaultSavePlanner(flatten_state_dict=False))
    assert FileSystemReader(path).read_metadata().planner_data is None


@pytest.mark.defect("B5")
def test_b5_checkpoints_without_planner_data(job: None, tmp_path: Path) -> None:
    save_without_paths(tmp_path / "ckpt")
    with pytest.raises(TypeError, match="not subscriptable"):
        STOCK({}, "optim", FileSystemReader(tmp_path / "ckpt"))
    loaded = OURS({}, "optim", FileSystemReader(tmp_path / "ckpt"))
    assert torch.equal(only_local(moment(loaded)), EVEN)
    assert float(moment(loaded, "step")) == 7


def nested_dict(fill: bool) -> dict[str, Any]:
    """On two ranks, of which the second has no shard; the param groups are a list."""
    value = sharded((2, 3), {0: [((0, 0), (2, 3))], 1: []})
    if fill:
        for shard in value.local_shards():
            shard.tensor.copy_(full_tensor("w", "exp_avg", (2, 3)))
    return {"optim": {"state": {"w": {"exp_avg": value}}, "param_groups": [{"lr": 0.5 if fill else 9.0}]}}


def load_without_a_shard(path: str, how: str) -> str:
    if how == "save":
        dcp.save(nested_dict(fill=True), checkpoint_id=path)
        return "saved"
    state_dict = nested_dict(fill=False)
    if how == "face":
        state_dict = OURS({"w": state_dict["optim"]["state"]["w"]["exp_avg"]}, "optim", FileSystemReader(path))
    else:
        planner = {"stock": DefaultLoadPlanner(), "planner": ours.ReaderWithOffset({})}[how]
        try:
            dcp.load(state_dict, checkpoint_id=path, planner=planner)
        except BaseException as error:  # torch's CheckpointException is no Exception
            return str(error)
    assert state_dict["optim"]["param_groups"] == [{"lr": 0.5}]
    for shard in state_dict["optim"]["state"]["w"]["exp_avg"].local_shards():
        assert torch.equal(shard.tensor, full_tensor("w", "exp_avg", (2, 3)))
    return "right"


@pytest.mark.defect("B6")
def test_b6_a_rank_without_a_shard_and_groups_in_a_list(ranks: RankPool, tmp_path: Path) -> None:
    """Stock takes the key that it dropped itself for the sign of a checkpoint of torch 2.3."""
    ranks.run(2, load_without_a_shard, str(tmp_path / "ckpt"), "save")
    for message in ranks.run(2, load_without_a_shard, str(tmp_path / "ckpt"), "stock"):
        assert "Missing key in checkpoint state_dict: optim.param_groups." in message
    for how in ("face", "planner"):
        assert ranks.run(2, load_without_a_shard, str(tmp_path / "ckpt"), how) == ["right", "right"]


@pytest.mark.defect("B7")
def test_b7_integer_keys(job: None, tmp_path: Path) -> None:
    """Stock puts what was saved under 0 beside it, under '0'."""
    saved = {"optim": {"state": {0: {"count": 5, "exp_avg": EVEN}}, "param_groups": [{"lr": 0.5, "params": [0]}]}}
    save_alone(saved, tmp_path / "ckpt")
    found = {"optim": {"state": {0: {"count": 0, "exp_avg": torch.zeros(48, 6)}}}}
    dcp.load(found, checkpoint_id=str(tmp_path / "ckpt"))
    assert {key: entries["count"] for key, entries in found["optim"]["state"].items()} == {0: 0, "0": 5}
    loaded = OURS({}, "optim", FileSystemReader(tmp_path / "ckpt"))["optim"]
    assert {key: entries["count"] for key, entries in loaded["state"].items()} == {0: 5}
    assert torch.equal(only_local(loaded["state"][0]["exp_avg"]), EVEN)


# --- B8 to B11: values and formats -------------------------------------------------------------------------------------


@pytest.mark.defect("B8")
def test_b8_dtypes(job: None, tmp_path: Path) -> None:
    """Stock copies fp32 into bf16 and loses bits; the face gives what was saved, whatever dtype the parameter has."""
    save_even(tmp_path / "ckpt")
    found = {KEY: torch.zeros(48, 6, dtype=torch.bfloat16)}
    dcp.load(found, checkpoint_id=str(tmp_path / "ckpt"))
    assert not torch.equal(found[KEY].float(), EVEN)
    for planner in (None, CountingPlanner()):
        like = {"even.weight": sharded((48, 6), {0: [((0, 0), (48, 6))]}, torch.bfloat16)}
        loaded = moment(OURS(like, "optim", FileSystemReader(tmp_path / "ckpt"), planner))
        assert loaded.dtype == torch.float32
        assert torch.equal(only_local(loaded), EVEN)


@pytest.mark.defect("B9")
def test_b9_the_callers_dict(job: None, tmp_path: Path) -> None:
    """Stock replaces values that it doesn't know in the dict that it was given; ours is only read."""
    save_even(tmp_path / "ckpt")
    found = {KEY: torch.zeros(48, 6), "mine": {1, 2}}
    dcp.load(found, checkpoint_id=str(tmp_path / "ckpt"), planner=DefaultLoadPlanner(allow_partial_load=True))
    assert found["mine"] is None
    for planner in (None, DefaultLoadPlanner(allow_partial_load=True), CountingPlanner()):
        weight, mine = torch.zeros(48, 6), {1, 2}
        model = {"even.weight": weight, "mine": mine}
        loaded = OURS(model, "optim", FileSystemReader(tmp_path / "ckpt"), planner)
        assert torch.equal(moment(loaded), EVEN)
        assert model.keys() == {"even.weight", "mine"}
        assert model["even.weight"] is weight
        assert model["mine"] is mine


@pytest.mark.defect("B10")
def test_b10_the_end_of_an_item(tmp_path: Path) -> None:
    """Stock's view of an item seeks beyond its end when it is asked for the last bytes."""
    (tmp_path / "file").write_bytes(b"..12345..")
    view = _ReaderView(io.BytesIO(b"..12345.."), 2, 5)
    view.seek(-2, os.SEEK_END)
    assert view.tell() == 7
    storage, last = open_storage(tmp_path), bytearray(2)
    storage.read_into("file", 2 + 5 - 2, memoryview(last))
    assert last == b"45"
    storage.close()


@pytest.mark.defect("B11")
def test_b11_safetensors_by_the_file_system_writer(job: None, tmp_path: Path) -> None:
    """Stock writes zips and safetensors into one file, which nothing can read; what we do with it is an error."""
    writer = FileSystemWriter(tmp_path / "ckpt", serialization_format=SerializationFormat.SAFETENSORS)
    save_alone(
        {"optim": {"state": {"even.weight": {"exp_avg": EVEN, "count": 5}}}}, tmp_path / "ckpt", storage_writer=writer
    )
    with pytest.raises(BaseException, match=r"optim\.state|Weights only|pickle|zip"):
        STOCK({}, "optim", FileSystemReader(tmp_path / "ckpt"))
    with pytest.raises(ShardferryError, match=r"optim\.state\.even\.weight\.exp_avg"):
        OURS({}, "optim", FileSystemReader(tmp_path / "ckpt"))


# --- B15 and B16: types ------------------------------------------------------------------------------------------------


def types_for_fsdp2(path: str, load: Loader) -> str:
    model = fsdp2(Model({"even.weight": (48, 6)}))
    value = moment(load(get_model_state_dict(model), "optim", FileSystemReader(path)))
    if isinstance(value, DTensor):
        assert value.placements == model.even.weight.placements
        assert torch.equal(value.full_tensor(), EVEN)
    return type(value).__name__


@pytest.mark.defect("B15")
def test_b15_dtensors(ranks: RankPool, tmp_path: Path) -> None:
    """Stock gives FSDP2 ShardedTensors, which it can't take."""
    save_even(tmp_path / "ckpt")
    assert ranks.run(2, types_for_fsdp2, str(tmp_path / "ckpt"), STOCK) == ["ShardedTensor"] * 2
    assert ranks.run(2, types_for_fsdp2, str(tmp_path / "ckpt"), OURS) == ["DTensor"] * 2


def load_size_1(path: str, load: Loader) -> tuple[str, int]:
    like = chunked((1,), dist.group.WORLD)
    value = load({"one.weight": like}, "optim", FileSystemReader(path))["optim"]["state"]["one.weight"]["exp_avg"]
    local = [shard.tensor for shard in value.local_shards()] if isinstance(value, ShardedTensor) else [value]
    for tensor in local:
        assert torch.equal(tensor, full_tensor("one.weight", "exp_avg", (1,)))
    return type(value).__name__, sum(tensor.numel() for tensor in local)


@pytest.mark.defect("B16")
def test_b16_parameters_with_one_element(ranks: RankPool, tmp_path: Path) -> None:
    """Stock takes them for scalars and replicates their moments; FSDP holds them sharded."""
    state = {"one.weight": {"exp_avg": full_tensor("one.weight", "exp_avg", (1,)), "step": torch.tensor(7.0)}}
    save_alone({"optim": {"state": state}}, tmp_path / "ckpt")
    assert ranks.run(2, load_size_1, str(tmp_path / "ckpt"), STOCK) == [("Tensor", 1), ("Tensor", 1)]
    assert ranks.run(2, load_size_1, str(tmp_path / "ckpt"), OURS) == [("ShardedTensor", 1), ("ShardedTensor", 0)]


# --- B17 to B19 --------------------------------------------------------------------------------------------------------


@pytest.mark.defect("B17")
def test_b17_strides(job: None, tmp_path: Path) -> None:
    """Torch stores a transposed tensor column by column, and up to 2.14 its metadata doesn't say so."""
    transposed = EVEN.t().contiguous().t()
    assert not transposed.is_contiguous()
    save_alone({"optim": {"state": {"even.weight": {"exp_avg": transposed}}}}, tmp_path / "ckpt")
    metadata = pickle.loads((tmp_path / "ckpt" / ".metadata").read_bytes())
    assert not hasattr(metadata.state_dict_metadata[KEY].properties, "strides")
    (info,) = metadata.storage_data.values()
    item = (tmp_path / "ckpt" / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
    start = parse_header(item[:HEADER_BYTES]).raw_start
    naive = torch.frombuffer(bytearray(item[start : start + 48 * 6 * 4]), dtype=torch.float32).view(48, 6)
    assert not torch.equal(naive, EVEN)  # what a reader gets that believes the metadata
    assert torch.equal(only_local(moment(OURS({}, "optim", FileSystemReader(tmp_path / "ckpt")))), EVEN)


class AnotherThread(dict[str, Any]):
    """A state dict that, whenever it is walked through, flattens another one, as a save in another thread does."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.keys_of_the_other: set[str] = set()

    def items(self) -> Any:
        self.keys_of_the_other |= flatten_state_dict({"groups": [{"lr": 0.5}]})[0].keys()
        return super().items()


@pytest.mark.defect("B18")
def test_b18_two_at_a_time(job: None, tmp_path: Path) -> None:
    """Stock flips a module-wide version meanwhile: what another thread saves then gets the keys of torch 2.3."""
    save_even(tmp_path / "ckpt")
    metadata = FileSystemReader(tmp_path / "ckpt").read_metadata()

    def keys_meanwhile(planner: DefaultLoadPlanner) -> set[str]:
        state_dict = AnotherThread({KEY: torch.zeros(48, 6)})
        planner.set_up_planner(state_dict, metadata, is_coordinator=True)
        planner.create_local_plan()
        assert _version._derived_version is None
        return state_dict.keys_of_the_other

    assert keys_meanwhile(DefaultLoadPlanner()) == {"groups.0.lr", "groups"}
    assert keys_meanwhile(ours.ReaderWithOffset({})) == {"groups.0.lr"}


@pytest.mark.defect("B19")
def test_b19_without_a_state_dict(job: None, tmp_path: Path) -> None:
    """Stock's planner that makes up a state dict fails without planner_data, and allocates every tensor whole."""
    save_without_paths(tmp_path / "ckpt")
    planner = _EmptyStateDictLoadPlanner(keys={"optim"})
    metadata = FileSystemReader(tmp_path / "ckpt").read_metadata()
    with pytest.raises(AttributeError):
        planner.set_up_planner({}, metadata, is_coordinator=True)
    made_up: dict[str, Any] = {}
    _EmptyStateDictLoadPlanner().set_up_planner(made_up, metadata, is_coordinator=True)
    assert made_up[KEY].shape == (48, 6)
    assert open_checkpoint(tmp_path / "ckpt").tensors[KEY].shape == (48, 6)  # without a byte of it
    assert torch.equal(only_local(moment(OURS({}, "optim", FileSystemReader(tmp_path / "ckpt")))), EVEN)
