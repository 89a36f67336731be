"""Fails when what we use of torch's and Ray's private parts changes; each is touched in one place only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import torch
import torch.distributed as dist
from ray.autoscaler._private.util import prepare_config, validate_config
from torch.distributed.checkpoint import FileSystemReader, _hf_utils
from torch.distributed.checkpoint._extension import ExtensionRegistry, ZStandard
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.checkpoint._traverse import traverse_state_dict_v_2_3
from torch.distributed.checkpoint.planner_helpers import _create_chunk_list
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._flat_param import FlatParamHandle, _ShardParamInfo
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from shardferry.checkpoint.safetensors import INDEX_FILE, OFFSETS_REMARK, SHARDING_REMARK, SUFFIX
from shardferry.dcp.sharded_tensors import boxes_as_sharded_tensor, region_of
from shardferry.layout.from_tensor import strided_shard
from shardferry.optimizer.fsdp1 import flattened_parameters
from shardferry.read.transforms import ZSTANDARD
from shardferry.region import Region
from tests.support.models import SHAPES, Model, fsdp1
from tests.support.ranks import RankPool


def test_strided_shard() -> None:
    """shardferry/layout/placing.py"""
    placement = strided_shard(0, 2)
    assert not placement.is_replicate()
    assert (placement.dim, placement.split_factor) == (0, 2)


def test_operators_and_storages() -> None:
    """shardferry/optimizer/shadow.py follows what comes of what"""
    assert torch.ops.aten.add_.Tensor._schema.is_mutable
    assert not torch.ops.aten.add.Tensor._schema.is_mutable
    assert torch.ops.aten.new_zeros.default._schema.name == "aten::new_zeros"
    tensor = torch.empty(4, device="meta")
    assert tensor[1:].untyped_storage()._cdata == tensor.untyped_storage()._cdata
    assert torch.empty(4, device="meta").untyped_storage()._cdata != tensor.untyped_storage()._cdata


def local_tensor_is_an_object() -> None:
    mesh, local = init_device_mesh("cpu", (2,)), torch.zeros(4)
    parameter: Any = torch.nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)], run_check=False))
    parameter._local_tensor.__create_chunk_list__ = list
    assert parameter._local_tensor.__create_chunk_list__ is list
    assert parameter.__create_chunk_list__() == []  # torch asks it too


def test_local_tensor(ranks: RankPool) -> None:
    """shardferry/layout/from_tensor.py"""
    ranks.run(2, local_tensor_is_an_object)


def test_shard_param_info_fields() -> None:
    """shardferry/optimizer/fsdp1.py"""
    wanted = {"in_shard", "offset_in_shard", "numel_in_shard", "intra_param_start_idx"}
    assert wanted <= set(_ShardParamInfo._fields)


def flat_parameter_tells_where_parameters_are() -> dict[str, int]:
    model = fsdp1(Model(), use_orig_params=False)
    assert isinstance(model._handle, FlatParamHandle)
    flat = model._handle.flat_param
    assert isinstance(flat, torch.nn.Parameter)
    (found,) = flattened_parameters(model)
    assert found.tensor is flat
    return {part.fqn: part.layout.local_numel for part in found.parts}


def test_flat_parameters(ranks: RankPool) -> None:
    """shardferry/optimizer/fsdp1.py: both ranks' slices make up each parameter."""
    one, other = ranks.run(2, flat_parameter_tells_where_parameters_are)
    assert {fqn: one[fqn] + other[fqn] for fqn in one} == {f: torch.Size(s).numel() for f, s in SHAPES.items()}


def tied_flat_parameter() -> tuple[str, ...]:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    (found,) = flattened_parameters(FullyShardedDataParallel(model, device_id=torch.device("cpu")))
    (part,) = found.parts
    return (part.fqn, *part.aliases)


def test_flat_parameters_tell_which_are_tied(ranks: RankPool) -> None:
    """shardferry/optimizer/fsdp1.py"""
    assert ranks.run(2, tied_flat_parameter) == [("0.weight", "1.weight")] * 2


def test_transformations_that_torch_brings() -> None:
    """shardferry/read/transforms.py: one more is one more to undo."""
    assert set(ExtensionRegistry().extensions) == {ZSTANDARD}
    assert ZStandard().get_descriptor() == f"{ZSTANDARD}/1"


def test_names_in_and_around_safetensors_files() -> None:
    """shardferry/checkpoint/safetensors.py"""
    assert (_hf_utils.CUSTOM_METADATA_KEY, _hf_utils.SAVED_OFFSETS_KEY) == (SHARDING_REMARK, OFFSETS_REMARK)
    assert (_hf_utils._metadata_fn, _hf_utils.SUFFIX) == (INDEX_FILE, SUFFIX)


def test_readers_of_torch(tmp_path: Path) -> None:
    """shardferry/dcp/load.py"""
    assert ExtensionRegistry().extensions == FileSystemReader(tmp_path).transforms.extension_registry.extensions
    reader = FsspecReader("memory://ckpt")
    assert isinstance(reader.fs.fs, fsspec.AbstractFileSystem)
    assert reader.path == "memory://ckpt"


def sharded_tensor_without_a_collective() -> None:
    """Rank 1 makes none; a collective would wait for it."""
    if dist.get_rank() == 1:
        return
    region, local = Region((2, 0), (2, 3)), torch.ones(2, 3)
    made = boxes_as_sharded_tensor((8, 3), torch.float32, [(region, local)], group=dist.group.WORLD)
    (shard,) = made.local_shards()
    assert shard.tensor is local
    assert made.size() == (8, 3)
    assert sum(region_of(other).numel for other in made.metadata().shards_metadata) == 24


def test_sharded_tensors(ranks: RankPool) -> None:
    """shardferry/dcp/sharded_tensors.py: shards whose placement has no rank are nobody's."""
    ranks.run(2, sharded_tensor_without_a_collective)


def test_planner_helpers() -> None:
    """shardferry/dcp/planner.py"""
    (chunk,) = _create_chunk_list(torch.zeros(2, 3))
    assert (tuple(chunk.offsets), tuple(chunk.sizes)) == ((0, 0), (2, 3))
    visited: dict[tuple[Any, ...], Any] = {}
    traverse_state_dict_v_2_3({"a": {"b": torch.zeros(1)}, "groups": [{"lr": 1}]}, visited.__setitem__)
    assert visited.keys() == {("a", "b"), ("groups",)}


def specs_of_flattened_dtensors() -> list[tuple[int, ...]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = parallelize_module(torch.nn.Linear(4, 8), mesh["tp"], ColwiseParallel())
    flat = FullyShardedDataParallel(model, device_mesh=mesh["dp"], device_id=torch.device("cpu"))._handle.flat_param
    assert all(isinstance(spec, DTensorSpec) for spec in flat._param_extensions)
    assert [tuple(shape) for shape in flat._shapes] == [(4, 4), (4,)], "what was flattened are local tensors"
    return [tuple(spec.shape) for spec in flat._param_extensions]


def test_flattened_dtensors(ranks: RankPool) -> None:
    """shardferry/optimizer/fsdp1.py: FSDP1 over TP keeps what the DTensors were."""
    assert ranks.run(4, specs_of_flattened_dtensors) == [[(8, 4), (8,)]] * 4


def test_process_groups_of_two() -> None:
    """shardferry/handoff/collective.py; its own tests make them"""
    options = dist.ProcessGroupGloo._Options()
    assert options._timeout
    assert options._devices == []
    assert callable(dist.ProcessGroupGloo.create_device)
    assert callable(dist.ProcessGroupGloo.abort)


def test_cluster_launcher_schema() -> None:
    """scripts/validate_cluster.py"""
    assert callable(prepare_config)
    assert callable(validate_config)
