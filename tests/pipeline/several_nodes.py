"""Stages on a cluster of three raylets on this machine; prints what happened as JSON. A process of its own: it has its own Ray.

Arguments: a checkpoint of four ranks; a directory.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import chdir
from itertools import product
from pathlib import Path
from typing import Any

import ray
import torch
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, remove_placement_group

from shardferry.errors import ShardferryError
from shardferry.pipeline import OptimizerLoadStage
from shardferry.schemas import StageConfig
from tests.support.models import SHAPES, STATES
from tests.support.oracle import full_tensor
from tests.support.trainers import Fsdp2Trainer, never_stepped

WORLD_SIZE = 4


@ray.remote(num_cpus=0)
class Opener:
    """Opens a shard where it runs."""

    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()

    def elements(self, handle: Any) -> int:
        with handle.open() as shard:
            state = shard.state_dict()["state"].values()
            return sum(entry["exp_avg"].numel() for entry in state if "exp_avg" in entry)


def error_of(call: Callable[..., Any], **arguments: Any) -> list[str]:
    try:
        call(**arguments)
    except ShardferryError as error:
        return [type(error).__name__, str(error)]
    return []


def equal_elements(handle: Any) -> int:
    """How many elements a shard has, all as they were saved."""
    compared = 0
    with handle.open() as shard:
        state = shard.state_dict()["state"]
        for fqn, name in product(SHAPES, STATES):
            full = full_tensor(fqn, name, SHAPES[fqn])
            for whole, inside in shard.regions(fqn, name):
                expected = full[tuple(map(slice, whole.offsets, whole.ends))]
                assert torch.equal(state[fqn][name][tuple(map(slice, inside.offsets, inside.ends))], expected)
                compared += expected.numel()
    return compared


class Scenarios:
    """Each method is a situation; what it returns is printed under its name."""

    def __init__(self, cluster: Cluster, checkpoint: str, directory: Path, workers: list[Any]) -> None:
        self._cluster, self._checkpoint, self._directory, self._workers = cluster, checkpoint, directory, workers

    def _stage(self, world_size: int = 0, **sections: Any) -> OptimizerLoadStage:
        values: dict[str, Any] = {"checkpoint": {"location": self._checkpoint}, **sections}
        if world_size:
            values["topology"] = {"mesh": {"dp": world_size}, "default": {"dp": "Shard(0)"}}
        options = values.pop("options", {})
        return OptimizerLoadStage(StageConfig.model_validate(values), **options)

    def trainers_hold_all_gpus(self) -> Any:
        actor = ray.remote(num_gpus=1, num_cpus=0)(Fsdp2Trainer)
        store = str(self._directory / "store")
        trainers = [actor.remote(rank, WORLD_SIZE, store) for rank in range(WORLD_SIZE)]
        ray.get([trainer.begin.remote(never_stepped) for trainer in trainers])
        free = ray.available_resources().get("GPU", 0)
        report = self._stage().run(trainers).report
        checked = sum(ray.get([trainer.check.remote() for trainer in trainers]))
        ray.get([trainer.begin.remote(never_stepped) for trainer in trainers])
        in_process = self._stage(handoff={"transport": "in_process"}).run(trainers).report
        again = sum(ray.get([trainer.check.remote() for trainer in trainers]))
        for trainer in trainers:
            ray.kill(trainer)
        return {
            "free": free,
            "transports": sorted({rank.transport for rank in report.ranks}),
            "gpus": [rank.gpu_ids for rank in report.ranks],
            "elements": checked,
            "in_process": sorted({rank.transport for rank in in_process.ranks}),
            "elements_in_process": again,
        }

    def users_placement_group(self) -> Any:
        group = placement_group([{"CPU": 1}, {"GPU": 1, "CPU": 1}, {"GPU": 1, "CPU": 1}], strategy="SPREAD")
        ray.get(group.ready(), timeout=60)
        loading = self._stage(
            2,
            actors={"gpus_per_actor": 0.25, "cpus_per_actor": 0},
            options={"placement_group": group, "bundles": [2, 1]},
        ).submit()
        nodes = [joined.node_id for joined in loading.started().joined]
        openers = [
            Opener.options(num_gpus=0.75, scheduling_strategy=loading.beside(rank)).remote() for rank in range(2)
        ]
        same = [ray.get(opener.node.remote(), timeout=60) == node for opener, node in zip(openers, nodes, strict=True)]
        elements = [ray.get(o.elements.remote(ref)) for o, ref in zip(openers, loading.refs, strict=True)]
        used = ray.available_resources().get("GPU", 0)
        loading.close()
        for opener in openers:
            ray.kill(opener)
        remove_placement_group(group)
        return {"beside": same, "elements": sum(elements), "gpus_outside_of_it": used}

    def disks_of_their_own(self) -> Any:
        """A relative location: the raylets, and so their workers, run in directories of their own. The head has the metadata alone."""
        with chdir(self._directory / "head"):
            spread = {"placement": "SPREAD"}
            direct = error_of(self._stage(4, actors=spread, read={"strategy": "direct"}).run, location="ckpt")
            with self._stage(4, actors=spread).run(location="ckpt") as result:
                elements = sum(map(equal_elements, result.handles))
                report = result.report
            store = str(self._directory / "store of disks")
            actor = ray.remote(num_gpus=1, num_cpus=0)(Fsdp2Trainer)
            trainers = [actor.remote(rank, WORLD_SIZE, store) for rank in range(WORLD_SIZE)]
            ray.get([trainer.begin.remote(never_stepped) for trainer in trainers])
            live = self._stage().run(trainers, location="ckpt").report
            checked = sum(ray.get([trainer.check.remote() for trainer in trainers]))
            for trainer in trainers:
                ray.kill(trainer)
        return {
            "direct": direct,
            "strategy": [report.strategy, live.strategy],
            "elements": elements,
            "elements_of_trainers": checked,
            "unique": [report.unique_bytes_needed, live.unique_bytes_needed],
        }

    def labels(self) -> Any:
        loading = self._stage(2, actors={"label_selector": {"disk": "fast"}}).submit()
        nodes = {joined.node_id for joined in loading.started().joined}
        opener = Opener.options(scheduling_strategy=loading.beside(0)).remote()
        beside = ray.get(opener.node.remote(), timeout=60) in nodes
        transports = sorted({rank.transport for rank in loading.result().report.ranks})
        loading.close()
        ray.kill(opener)
        return {"nodes": len(nodes), "beside": beside, "transports": transports}

    def between_nodes(self) -> Any:
        """Each shard is opened on the node of the other loader."""
        told = {}
        for transport in ("collective", "nixl"):
            loading = self._stage(2, actors={"placement": "STRICT_SPREAD"}, handoff={"transport": transport}).submit()
            openers = [Opener.options(scheduling_strategy=loading.beside(rank)).remote() for rank in (1, 0)]
            told[transport] = [ray.get(o.elements.remote(r)) for o, r in zip(openers, loading.refs, strict=True)]
            loading.close()
            for opener in openers:
                ray.kill(opener)
        return told

    def no_room(self) -> Any:
        told = {}
        for placement, world_size in (("STRICT_PACK", 4), ("STRICT_SPREAD", 4), ("PACK", 9)):
            start = time.monotonic()
            try:
                self._stage(world_size, actors={"placement": placement}).submit()
            except ShardferryError as error:
                told[placement] = [type(error).__name__, str(error), time.monotonic() - start < 5]
        return told

    def all_is_taken(self) -> Any:
        holders = [Opener.options(num_gpus=1).remote() for _ in range(3)]
        ray.get([holder.node.remote() for holder in holders])
        try:
            self._stage(2, timeouts={"start_s": 4}).run()
        except ShardferryError as error:
            return [type(error).__name__, str(error)]
        finally:
            for holder in holders:
                ray.kill(holder)
        return "nothing raised"

    def node_dies_before_the_hand_over(self) -> Any:
        """The last one: a node is gone afterwards."""
        loading = self._stage(2, actors={"placement": "STRICT_SPREAD"}, handoff={"transport": "object_store"}).submit()
        handles = loading.result(timeout=100).handles
        nodes = [joined.node_id for joined in loading.started().joined]
        victim = next(worker for worker in self._workers if worker.node_id in nodes)
        self._cluster.remove_node(victim, allow_graceful=False)
        told = []
        for handle, node in zip(handles, nodes, strict=True):
            start = time.monotonic()
            try:
                told.append(["opened", handle.open().world_rank])
            except ShardferryError as error:
                told.append([type(error).__name__, str(error), node == victim.node_id, time.monotonic() - start])
        return told


def main() -> None:
    checkpoint, directory = sys.argv[1], Path(sys.argv[2])
    os.environ["RAY_max_direct_call_object_size"] = "0"  # noqa: SIM112 - Ray's name. Small shards, too, lie in the object store of their node
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 8, "num_gpus": 0, "include_dashboard": False, "object_store_memory": 128 << 20},
    )
    # While the head is the only node: else this process may belong to one that is killed.
    ray.init(address=cluster.address, log_to_driver=False)
    workers = []
    for kind, of_ranks in (("head", ""), ("fast", "01"), ("slow", "23")):
        disk = directory / kind / "ckpt"
        disk.mkdir(parents=True)
        for of_rank in of_ranks:
            shutil.copy2(Path(checkpoint) / f"__{of_rank}_0.distcp", disk)
        if kind == "head":
            shutil.copy2(Path(checkpoint) / ".metadata", disk)
            continue
        with chdir(disk.parent):
            workers.append(
                cluster.add_node(num_cpus=4, num_gpus=2, object_store_memory=128 << 20, labels={"disk": kind})
            )
    cluster.wait_for_nodes()
    scenarios = Scenarios(cluster, checkpoint, directory, workers)
    told: dict[str, Any] = {}
    for name in [name for name in vars(Scenarios) if not name.startswith("_")]:
        told[name] = getattr(scenarios, name)()
        print(name, file=sys.stderr, flush=True)
        for _ in range(100):
            held = {
                n: a
                for n, a in ray.cluster_resources().items()
                if ray.available_resources().get(n, 0) < a and n in ("CPU", "GPU")
            }
            if not held:
                break
            time.sleep(0.2)
        told[name] = {"told": told[name], "held": held}
    print(json.dumps(told))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
