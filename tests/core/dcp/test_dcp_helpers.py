"""`shardferry.dcp`'s helpers: torch's own names and signatures, and torch's own answers where these are right."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.optimizer as stock
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor import Shard as Cut

import shardferry.dcp as ours
from shardferry.errors import LayoutError
from tests.support.ranks import RankPool
from tests.support.sharded import chunked, nested, sharded

TORCH_NAMES = (
    "load_sharded_optimizer_state_dict",
    "_ReaderWithOffset",
    "_gen_rank_device",
    "_create_colwise_spec",
    "_is_nested_tensor",
    "_alloc_tensor",
    "_get_state_dict_2d_layout",
)


@pytest.mark.parametrize("name", TORCH_NAMES)
def test_same_names_and_parameters_as_torch(name: str) -> None:
    theirs = inspect.signature(getattr(stock, name)).parameters
    mine = inspect.signature(getattr(ours, name)).parameters
    assert list(mine)[: len(theirs)] == list(theirs)
    assert [p.default for p in list(mine.values())[: len(theirs)]] == [p.default for p in theirs.values()]


def test_rank_device() -> None:
    assert ours.rank_device(3, "cpu") == "cpu"
    assert ours.rank_device(3) == ("cpu" if not torch.cuda.is_available() else f"cuda:{3 % torch.cuda.device_count()}")


def test_alloc_tensor() -> None:
    properties = dcp.metadata.TensorProperties(dtype=torch.bfloat16)
    tensor = ours.alloc_tensor(properties, (3, 4), "cpu")
    assert (tensor.shape, tensor.dtype, tensor.device.type) == ((3, 4), torch.bfloat16, "cpu")


def compare_with_torch() -> None:
    """On tensors of each kind, and on a group that torch's own code gets right: the whole job."""
    world = dist.group.WORLD
    mesh = init_device_mesh("cpu", (2,))
    state_dict = {
        "plain": torch.zeros(3),
        "dtensor": distribute_tensor(torch.zeros(4, 2), mesh, [Cut(0)]),
        "sharded": chunked((8, 3), world),
        "without a shard": sharded((4,), {0: [((0,), (4,))], 1: []}),
        "nested": nested((8, 6), dim=1, tp=2),
        "nested rows": nested((8, 6), dim=0, tp=1),
    }
    for name, tensor in state_dict.items():
        assert ours.is_nested_tensor(tensor) == stock._is_nested_tensor(tensor) == name.startswith("nested")
    for shown in (state_dict, {"plain": state_dict["plain"]}):
        assert ours.get_state_dict_2d_layout(shown) == stock._get_state_dict_2d_layout(shown)
    with_extra_state = {**state_dict, "layer._extra_state": {"any": "thing"}}
    assert ours.get_state_dict_2d_layout(with_extra_state) == ours.get_state_dict_2d_layout(state_dict)
    for group in (None, world):
        assert ours.create_colwise_spec(group) == stock._create_colwise_spec(group)


def test_as_torch(ranks: RankPool) -> None:
    ranks.run(2, compare_with_torch)


def refuse_other_nestings() -> None:
    mesh = init_device_mesh("cpu", (2,))
    inner = distribute_tensor(torch.zeros(4, 2), mesh, [Replicate()])
    holder = chunked((8, 2), dist.group.WORLD)
    holder.local_shards()[0].tensor = inner
    with pytest.raises(LayoutError, match="Cannot handle DTensor nested inside ShardedTensor"):
        ours.is_nested_tensor(holder)
    twice = DTensor.from_local(torch.zeros(4, 2), mesh, [Replicate()], run_check=False)
    twice._local_tensor = inner
    with pytest.raises(LayoutError, match="Cannot handle nested DTensor"):
        ours.is_nested_tensor(twice)


def test_other_nestings_are_refused(ranks: RankPool) -> None:
    """As torch refuses them: with a ValueError and its words."""
    assert issubclass(LayoutError, ValueError)
    ranks.run(2, refuse_other_nestings)


def spec_of_a_group() -> list[int]:
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    spec = ours.create_colwise_spec(groups[dist.get_rank() % 2])
    return [placement.rank() for placement in spec.placements]


def test_a_spec_names_ranks_of_the_job(ranks: RankPool) -> None:
    """Where torch's names ranks of the group, which its ShardedTensor then refuses (B2)."""
    assert ranks.run(4, spec_of_a_group) == [[0, 2], [1, 3], [0, 2], [1, 3]]


def test_private_names_are_the_public_ones() -> None:
    assert ours._ReaderWithOffset is ours.ReaderWithOffset
    assert ours._gen_rank_device is ours.rank_device
    assert ours._create_colwise_spec is ours.create_colwise_spec
    assert ours._is_nested_tensor is ours.is_nested_tensor
    assert ours._alloc_tensor is ours.alloc_tensor
    assert ours._get_state_dict_2d_layout is ours.get_state_dict_2d_layout
    assert ours.STATE_DICT_2D_LAYOUT
    assert isinstance(ours.ReaderWithOffset({}), dcp.DefaultLoadPlanner)
