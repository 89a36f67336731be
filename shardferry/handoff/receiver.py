"""A mix-in for a trainer's actor class: a stage asks it for its layout and delivers the loaded state to it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.nn import Module
from torch.optim import Optimizer

from shardferry.arena import gpu_identity, host_identity
from shardferry.errors import LayoutError
from shardferry.handoff.handle import ShardHandle
from shardferry.handoff.transport import Recipient
from shardferry.layout.live import LiveLayout
from shardferry.optimizer.live import LiveModel
from shardferry.optimizer.live_layout import live_layout


@dataclass(frozen=True, slots=True)
class Reception:
    """A trainer's answer to the stage: the layout that it wants, and the process that it runs in."""

    layout: LiveLayout
    host: str  # see `shardferry.arena.host_identity`
    pid: int
    gpu: str | None = None  # of the model, see `shardferry.arena.gpu_identity`

    def recipient(self) -> Recipient:
        """The trainer as seen from the calling process."""
        same_host = self.host == host_identity()
        return Recipient(same_host=same_host, same_process=same_host and self.pid == os.getpid(), gpu=self.gpu)


class OptimizerReceiver:
    """Mix into a trainer's actor class that has the attributes ``model`` and ``optimizer``.

    ::

        @ray.remote(num_gpus=1)
        class Trainer(shardferry.OptimizerReceiver):
            def __init__(self): self.model, self.optimizer = ...

        stage.run(trainers)

    Where the attributes have other names, override `shardferry_target`.
    """

    model: Module
    optimizer: Optimizer

    def shardferry_target(self) -> tuple[Module | Sequence[Module], Optimizer | Sequence[Optimizer]]:
        """The wrapped model, and the optimizer that gets the loaded state; several of each where a rank has several."""
        return self.model, self.optimizer

    def shardferry_layout(self, world_rank: int, world_size: int) -> Reception:
        """The layout of this trainer's model and optimizer; the stage calls this before it loads.

        Args:
            world_rank: this trainer's place in the list of trainers that the stage was given.
            world_size: length of that list.

        Raises:
            InstallError: the optimizer trains a tensor that is not a parameter of the model.
            LayoutError: the layout of a parameter is not supported, or the trainers are not in the order of their ranks.
        """
        own = dist.get_rank() if dist.is_initialized() else 0
        if dist.is_initialized() and dist.get_world_size() == world_size and own != world_rank:
            raise LayoutError(
                f"trainer {world_rank} of the list given to the stage is rank {own} of its process group; give the trainers "
                "in the order of their ranks"
            )
        model, optimizer = self.shardferry_target()
        live = LiveModel.of(model, optimizer)
        layout = live_layout(live, world_rank=world_rank, world_size=world_size)
        return Reception(layout, host_identity(), os.getpid(), gpu_identity(live.device))

    def shardferry_receive(self, handle: ShardHandle) -> dict[str, Any]:
        """Install this rank's shard; the stage calls this once all ranks are loaded.

        Returns:
            ``world_rank``, the ``transport`` of the shard, and what the stage's report lists of the load: ``overwritten``
            hyperparameters (group, name, old and new value in words), ``missing_entries``, ``unexpected_entries``, ``warnings``.

        Raises:
            HandoffError: the shard can't be opened here.
            InstallError: the shard doesn't fit the model and the optimizer.
        """
        model, optimizer = self.shardferry_target()
        with handle.open() as shard:
            missing, unexpected, overwritten, warnings = shard.load_into(model, optimizer).report()
        return {
            "world_rank": handle.world_rank,
            "transport": handle.transport,
            "overwritten": [(change.group, change.name, repr(change.old), repr(change.new)) for change in overwritten],
            "missing_entries": list(missing),
            "unexpected_entries": list(unexpected),
            "warnings": list(warnings),
        }
