"""Fails when what we use of torch's and Ray's private parts changes; each is touched in one place only."""

from __future__ import annotations

import torch
from ray.autoscaler._private.util import prepare_config, validate_config
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._flat_param import FlatParamHandle, _ShardParamInfo
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from shardferry.fsdp1 import flattened_parameters
from shardferry.placing import strided_shard
from tests.support.models import SHAPES, Model, fsdp1
from tests.support.ranks import RankPool


def test_strided_shard() -> None:
    """shardferry/handoff.py"""
    placement = strided_shard(0, 2)
    assert not placement.is_replicate()
    assert (placement.dim, placement.split_factor) == (0, 2)


def test_shard_param_info_fields() -> None:
    """shardferry/fsdp1.py"""
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
    """shardferry/fsdp1.py: both ranks' slices make up each parameter."""
    one, other = ranks.run(2, flat_parameter_tells_where_parameters_are)
    assert {fqn: one[fqn] + other[fqn] for fqn in one} == {f: torch.Size(s).numel() for f, s in SHAPES.items()}


def specs_of_flattened_dtensors() -> list[tuple[int, ...]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = parallelize_module(torch.nn.Linear(4, 8), mesh["tp"], ColwiseParallel())
    flat = FullyShardedDataParallel(model, device_mesh=mesh["dp"], device_id=torch.device("cpu"))._handle.flat_param
    assert all(isinstance(spec, DTensorSpec) for spec in flat._param_extensions)
    assert [tuple(shape) for shape in flat._shapes] == [(4, 4), (4,)], "what was flattened are local tensors"
    return [tuple(spec.shape) for spec in flat._param_extensions]


def test_flattened_dtensors(ranks: RankPool) -> None:
    """shardferry/fsdp1.py: FSDP1 over TP keeps what the DTensors were."""
    assert ranks.run(4, specs_of_flattened_dtensors) == [[(8, 4), (8,)]] * 4


def test_cluster_launcher_schema() -> None:
    """scripts/validate_cluster.py"""
    assert callable(prepare_config)
    assert callable(validate_config)
