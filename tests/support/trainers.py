"""Ray actors of "somebody else": trainers that know shardferry only by its public names."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import ray
import torch.distributed as dist
from torch.nn import Module
from torch.optim import Optimizer

import shardferry
from tests.support.models import OTHER, Model, adamw, check_groups, check_state, fsdp2

Target = tuple[Module | Sequence[Module], Optimizer | Sequence[Optimizer]]


def never_stepped() -> Target:
    """An FSDP2 model, and an optimizer that has no state yet."""
    model = fsdp2(Model())
    return model, adamw(model, OTHER)


class Fsdp2Trainer(shardferry.OptimizerReceiver):
    """One rank of an FSDP2 job. Each test gives it a model of its own, as starting a process takes longest."""

    def __init__(self, world_rank: int, world_size: int, rendezvous: str) -> None:
        store = dist.FileStore(rendezvous, world_size)
        dist.init_process_group("gloo", store=store, rank=world_rank, world_size=world_size)

    def begin(self, build: Callable[[], Target]) -> None:
        """Forget the model and the optimizer; the stage's first question builds the new ones."""
        self._build, self._target = build, None
        gc.collect()  # FSDP's modules are in circles, and hold the tensors that lie in a loader's arena

    def shardferry_target(self) -> Target:
        if self._target is None:
            self._target = self._build()
        return self._target

    def do(self, work: Callable[..., Any], *args: Any) -> Any:
        """What ``work(trainer, *args)`` returns."""
        return work(self, *args)

    def check(self) -> int:
        """Every element of the state against the oracle; returns how many."""
        model, optimizer = self.shardferry_target()
        if isinstance(model, Module):
            check_groups(optimizer)
            return check_state(model, optimizer)
        return sum(check_state(*part) for part in zip(model, optimizer, strict=True))


def start_trainers(world_size: int, rendezvous: str) -> list[Any]:
    """One actor a rank; they leave the cluster's CPUs and GPUs to the loaders."""
    actor = ray.remote(num_cpus=0)(Fsdp2Trainer)
    return [actor.remote(rank, world_size, rendezvous) for rank in range(world_size)]
