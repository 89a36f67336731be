"""Ray actors of "somebody else": trainers that know shardferry only by its public names."""

from __future__ import annotations

from typing import Any

import ray
import torch.distributed as dist

import shardferry
from tests.support.models import OTHER, Model, adamw, check_groups, check_state, fsdp2


class Fsdp2Trainer(shardferry.OptimizerReceiver):
    """One rank of an FSDP2 job whose optimizer has never stepped."""

    def __init__(self, world_rank: int, world_size: int, rendezvous: str) -> None:
        store = dist.FileStore(rendezvous, world_size)
        dist.init_process_group("gloo", store=store, rank=world_rank, world_size=world_size)
        self.model = fsdp2(Model())
        self.optimizer = adamw(self.model, OTHER)

    def check(self) -> int:
        """Every element of the state against the oracle; returns how many."""
        check_groups(self.optimizer)
        return check_state(self.model, self.optimizer)

    def gpu_ids(self) -> list[Any]:
        return ray.get_gpu_ids()


def start_trainers(world_size: int, rendezvous: str, trainer: type = Fsdp2Trainer, **options: Any) -> list[Any]:
    """One actor a rank."""
    actor = ray.remote(**{"num_cpus": 1, "num_gpus": 1, **options})(trainer)
    return [actor.remote(rank, world_size, rendezvous) for rank in range(world_size)]
