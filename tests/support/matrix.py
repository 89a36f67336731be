"""What a rank does in the matrix of topologies: lay the network out, save it with stock torch, load it, compare it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, init_from_local_shards
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

import shardferry
from shardferry.layout.live import LiveLayout
from shardferry.optimizer.live import LiveModel
from shardferry.optimizer.live_layout import live_layout
from tests.support.networks import HYPERPARAMETERS, OTHERS, STATES, STEP, group_of, state_of
from tests.support.topologies import Topology


@dataclass(frozen=True)
class Held:
    """What one rank of a topology holds."""

    layout: LiveLayout
    numbers: Mapping[str, np.ndarray]  # FQN to the numbers of its elements in this rank's memory, in their order there


def save_and_describe(topology: Topology, path: str) -> Held:
    """On each rank: a laid out network with the oracle's state, saved by stock torch."""
    model = topology.build(topology.unsaved)
    optimizer = _adamw(model, HYPERPARAMETERS)
    _fill_state(model, optimizer)
    options = StateDictOptions(flatten_optimizer_state_dict=topology.flattened)
    state_dict: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=options)
    _declare_boxes(model, state_dict)
    dcp.save({"optim": state_dict}, checkpoint_id=path)
    whole = topology.build(()) if topology.unsaved else model
    return _describe(whole, _adamw(whole, HYPERPARAMETERS))


def _describe(model: nn.Module, optimizer: torch.optim.Optimizer) -> Held:
    live = LiveModel((model,), (optimizer,))
    layout = live_layout(live, world_rank=dist.get_rank(), world_size=dist.get_world_size())
    numbers: dict[str, np.ndarray] = {}
    for parameter in live.parameters:
        memory = parameter.local.detach().contiguous().view(-1).to(torch.int64).numpy()
        for part in parameter.parts:
            numbers[part.fqn] = memory[part.position : part.position + part.layout.local_numel]
        assert sum(map(np.count_nonzero, (numbers[p.fqn] for p in parameter.parts))) == np.count_nonzero(memory)
    return Held(layout, numbers)


def load_and_compare(topology: Topology, path: str, without: Collection[str]) -> set[int]:
    """On each rank: load into a laid out network that has never stepped; the numbers of the elements compared."""
    model = topology.build(without)
    optimizer = _adamw(model, OTHERS)
    shardferry.load_optimizer_state(model, optimizer, path)
    found: set[int] = set()
    for group, expected in zip(optimizer.param_groups, HYPERPARAMETERS, strict=True):
        assert {name: group[name] for name in expected} == expected
        for parameter in group["params"]:
            found.update(_compare(model, parameter, optimizer.state.get(parameter, {})))
    return found - {0}


def _compare(model: nn.Module, parameter: torch.Tensor, state: Mapping[str, Any]) -> list[int]:
    weights = _local(parameter)
    if not _takes_steps(model, weights):
        assert not state
        return []
    assert state.keys() == {"step", *STATES}, f"elements {weights}: {sorted(state)}"
    assert float(state["step"]) == STEP
    for name in STATES:
        found, expected = _local(state[name]), state_of(weights, name)
        assert isinstance(state[name], DTensor) == isinstance(parameter, DTensor)
        assert found.shape == weights.shape
        assert found.dtype == weights.dtype
        assert torch.equal(found, expected), f"{name} of the elements {weights}: {found}, not {expected}"
    return weights.long().view(-1).tolist()


def _adamw(model: nn.Module, hyperparameters: tuple[Mapping[str, Any], ...]) -> torch.optim.Optimizer:
    named = list(model.named_parameters())
    groups = [[parameter for name, parameter in named if group_of(name) == index] for index in range(2)]
    return torch.optim.AdamW([{"params": params, **h} for params, h in zip(groups, hyperparameters, strict=True)])


def _fill_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        weights = _local(parameter)
        if _takes_steps(model, weights):
            values = {name: _like(parameter, state_of(weights, name)) for name in STATES}
            optimizer.state[parameter] = {"step": torch.tensor(STEP), **values}


def _takes_steps(model: nn.Module, weights: torch.Tensor) -> bool:
    """FSDP1 gives an empty slice no gradient, and so it never gets state."""
    return bool(weights.numel()) or not any(isinstance(m, FullyShardedDataParallel) for m in model.modules())


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _like(parameter: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    if not isinstance(parameter, DTensor):
        return local
    mesh, placements, whole = parameter.device_mesh, parameter.placements, (parameter.shape, parameter.stride())
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=whole[0], stride=whole[1])


def _declare_boxes(model: nn.Module, state_dict: dict[str, Any]) -> None:
    """Torch before 2.14 can't save a tensor that says itself what it holds; a ShardedTensor of several shards it can."""
    for fqn, parameter in model.named_parameters():
        if hasattr(parameter, "global_offsets"):
            for name in STATES:
                state_dict["state"][fqn][name] = _in_shards(parameter, state_dict["state"][fqn][name])


def _in_shards(parameter: Any, state: torch.Tensor) -> ShardedTensor:
    shards = [
        Shard.from_tensor_and_offsets(state.narrow(0, here[0], sizes[0]).clone(), list(there), dist.get_rank())
        for there, here, sizes in zip(
            parameter.global_offsets, parameter.local_offsets, parameter.local_sizes, strict=True
        )
        if 0 not in sizes
    ]
    return init_from_local_shards(shards, *parameter.global_shape)
