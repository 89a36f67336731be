"""A checkpoint as many ranks save it, written by one process: each rank's plan and files in turn, by torch's own planner and writer."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor import Shard as ShardOf
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.checkpoint import OPTIMIZER_KEY, adamw
from benchmarks.models import STATES, STEP, Shapes, fill_box
from shardferry.layout.tensor_layout import AxisCut, shard_on_mesh


def save_as_many(path: str, shapes: Shapes, num_ranks: int) -> None:
    """In one process of a process group of one: what ``dcp.save`` on each of ``num_ranks`` ranks would leave.

    Ranks are played one after another, with torch's process group that talks to nobody.
    """
    planners, plans = [], []
    for rank in range(num_ranks):
        _play(rank, num_ranks)
        planner = dcp.DefaultSavePlanner()
        planner.set_up_planner(_state_dict(shapes, rank, num_ranks), is_coordinator=rank == 0)
        planners.append(planner)
        plans.append(planner.create_local_plan())
    global_plans, metadata = planners[0].create_global_plan(plans)
    writer = dcp.FileSystemWriter(path)
    writer.set_up_storage_writer(True)
    writer.prepare_local_plan(global_plans[0])
    results = []
    for planner, plan in zip(planners, writer.prepare_global_plan(global_plans), strict=True):
        finished: SavePlan = planner.finish_plan(plan)
        results.append(writer.write_data(finished, planner).wait())
    writer.finish(metadata, results)


def _play(rank: int, num_ranks: int) -> None:
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_ranks)


def _state_dict(shapes: Shapes, rank: int, num_ranks: int) -> dict[str, Any]:
    """One rank's AdamW state, cut by rows as FSDP2 cuts it."""
    mesh = init_device_mesh("cpu", (num_ranks,))
    state: dict[str, dict[str, Any]] = {}
    for fqn, shape in shapes.items():
        region = shard_on_mesh(shape, [AxisCut(num_ranks, rank, ShardOf(0))]).boxes[0].region
        state[fqn] = {"step": torch.tensor(STEP)}
        for name in STATES:
            local = torch.empty(region.sizes)
            fill_box(local, fqn, name, shape, region)
            strides = torch.empty(shape, device="meta").stride()
            state[fqn][name] = DTensor.from_local(
                local, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=strides
            )
    parameters = {fqn: torch.empty(shape, device="meta") for fqn, shape in shapes.items()}
    names = {id(parameter): fqn for fqn, parameter in parameters.items()}
    groups = [
        {**group, "params": [names[id(parameter)] for parameter in group["params"]]}
        for group in adamw(parameters).param_groups
    ]
    return {OPTIMIZER_KEY: {"state": state, "param_groups": groups}}
