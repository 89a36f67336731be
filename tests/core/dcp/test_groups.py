"""Sub-groups of a job, in any order of ranks, and several loads at once in one process."""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import shardferry
from tests.support.models import SHAPES, Model, adamw, check_groups, check_state, fsdp2
from tests.support.ranks import RankPool

NUM_ELEMENTS = 2 * sum(torch.Size(shape).numel() for shape in SHAPES.values())


def load_in_group(path: str, members: list[list[int]]) -> tuple[int, int]:
    """Each group loads its own copy; ranks stand in a group in the order that is given, not in their world order."""
    groups = [dist.new_group(ranks) for ranks in members]
    place = next(index for index, ranks in enumerate(members) if dist.get_rank() in ranks)
    group = groups[place]
    model = fully_shard(Model(), mesh=DeviceMesh.from_group(group, "cpu"))
    optimizer = adamw(model)
    shardferry.load_optimizer_state(model, optimizer, path, process_group=group)
    check_groups(optimizer)
    return place, check_state(model, optimizer)


@pytest.mark.conformance(18)
@pytest.mark.parametrize(
    "members", [[[0, 1], [2, 3]], [[0, 3], [1, 2]], [[2, 1, 3], [0]]], ids=["halves", "mixed", "uneven"]
)
def test_groups_of_a_job(ranks: RankPool, saved_by: dict[int, Path], members: list[list[int]]) -> None:
    results = ranks.run(4, load_in_group, str(saved_by[3]), members)
    for place in range(len(members)):
        assert sum(compared for found, compared in results if found == place) == NUM_ELEMENTS


def load_out_of_order(path: str) -> None:
    model = fully_shard(Model({"even.weight": (48, 6)}), mesh=DeviceMesh("cpu", [1, 0]))
    shardferry.load_optimizer_state(model, torch.optim.AdamW(model.parameters()), path, keys="ignore_unexpected")


@pytest.mark.conformance(18)
def test_fsdp2_on_a_mesh_out_of_order_is_refused(ranks: RankPool, saved_by: dict[int, Path]) -> None:
    """Torch cuts by the process group's order and says the mesh's: even shapes would be loaded into the wrong rows."""
    for done, message in ranks.outcomes(2, load_out_of_order, str(saved_by[2])):
        assert not done
        assert "even.weight: FSDP2 was given the mesh" in message


def load_two_at_once(one: str, other: str) -> list[int]:
    """Two models, two process groups, two threads; with nothing global in between them."""
    compared = [0, 0]
    failures: list[BaseException] = []
    groups = [dist.new_group(list(range(dist.get_world_size())), timeout=timedelta(seconds=30)) for _ in range(2)]
    models = [fsdp2(Model()) for _ in range(2)]

    def load(place: int, path: str) -> None:
        try:
            optimizer = adamw(models[place])
            shardferry.load_optimizer_state(models[place], optimizer, path, process_group=groups[place])
            compared[place] = check_state(models[place], optimizer)
        except BaseException as error:  # raised again below: a thread's error is nobody's
            failures.append(error)

    threads = [threading.Thread(target=load, args=(place, path)) for place, path in enumerate((one, other))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if failures:
        raise failures[0]
    return compared


@pytest.mark.conformance(18)
def test_two_loads_at_once_in_one_process(ranks: RankPool, saved_by: dict[int, Path]) -> None:
    results = ranks.run(2, load_two_at_once, str(saved_by[4]), str(saved_by[3]))
    assert [sum(found) for found in zip(*results, strict=True)] == [NUM_ELEMENTS, NUM_ELEMENTS]
