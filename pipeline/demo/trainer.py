"""The demo's second half: trainers that continue from the checkpoint, as Ray actors."""

from __future__ import annotations

import torch
import torch.distributed as dist

import shardferry
from shardferry.pipeline.demo import training
from shardferry.pipeline.demo.model import GPT


class DemoTrainer(shardferry.OptimizerReceiver):
    """One rank of the second job."""

    model: GPT
    optimizer: torch.optim.Optimizer

    def __init__(self, world_rank: int, world_size: int, rendezvous: str) -> None:
        store = dist.FileStore(rendezvous, world_size)
        dist.init_process_group("gloo", store=store, rank=world_rank, world_size=world_size)
        self.start_over()

    def start_over(self) -> None:
        """Forget the weights and the optimizer state."""
        self.model, self.optimizer = training.build()

    def load_model(self, path: str) -> None:
        """Load the weights with stock torch; the optimizer state comes from the stage."""
        training.load_model(self.model, path)

    def load_all(self, path: str) -> None:
        """Load weights and optimizer state with stock torch: the control."""
        training.load_all(self.model, self.optimizer, path)

    def train(self, first: int, last: int) -> list[float]:
        """Take the steps ``first`` to ``last`` (exclusive). Returns the loss of each."""
        return training.train(self.model, self.optimizer, range(first, last))
