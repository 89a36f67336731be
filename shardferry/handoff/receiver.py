"""What a trainer's actor class mixes in so that a stage can ask it for its layout and deliver to it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.nn import Module
from torch.optim import Optimizer

from shardferry.arena import host_identity
from shardferry.errors import LayoutError
from shardferry.handoff.handle import ShardHandle
from shardferry.layout.live import LiveLayout
from shardferry.optimizer.live import LiveModel, live_layout


@dataclass(frozen=True, slots=True)
class Reception:
    """Where a trainer runs and what it wants."""

    layout: LiveLayout
    node: str  # see shardferry.handoff.handle.host_identity
    pid: int


class OptimizerReceiver:
    """Mix into a trainer's actor class that has the attributes ``model`` and ``optimizer``.

    ::

        @ray.remote(num_gpus=1)
        class Trainer(shardferry.OptimizerReceiver):
            def __init__(self): self.model, self.optimizer = ...

        stage.run(trainers)

    Where they have other names, override `shardferry_target`.
    """

    model: Module
    optimizer: Optimizer

    def shardferry_target(self) -> tuple[Module | Sequence[Module], Optimizer | Sequence[Optimizer]]:
        """The model (wrapped) and the optimizer whose state is wanted; several of each where a rank has several."""
        return self.model, self.optimizer

    def shardferry_layout(self, world_rank: int, world_size: int) -> Reception:
        """Called by the stage before it loads. Raises InstallError, LayoutError."""
        own = dist.get_rank() if dist.is_initialized() else 0
        if dist.is_initialized() and dist.get_world_size() == world_size and own != world_rank:
            raise LayoutError(
                f"trainer {world_rank} of the list given to the stage is rank {own} of its process group; give the trainers "
                "in the order of their ranks"
            )
        model, optimizer = self.shardferry_target()
        live = LiveModel.of(model, optimizer)
        layout = live_layout(live, world_rank=world_rank, world_size=world_size)
        return Reception(layout, host_identity(), os.getpid())

    def shardferry_receive(self, handle: ShardHandle) -> dict[str, Any]:
        """Called by the stage with this rank's shard: installs it."""
        model, optimizer = self.shardferry_target()
        with handle.open() as shard:
            shard.load_into(model, optimizer)
        return {"world_rank": handle.world_rank, "transport": handle.transport}
