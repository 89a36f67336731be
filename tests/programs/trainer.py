"""Train with Lightning's Trainer (FSDPStrategy or ModelParallelStrategy) and save; or load what it saved, on any number of ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytorch_lightning
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.optimizer
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.utils.data import DataLoader

import shardferry
import shardferry.dcp
from tests.programs.net import DECAYED, OTHERS, UNDECAYED, Net, groups_of, loss_of
from tests.programs.whole_state import write_whole_state


class Module(LightningModule):
    """Its parameters are named ``net.*``."""

    def __init__(self, seed: int, *hyperparameters: dict[str, Any]) -> None:
        super().__init__()
        self.net = Net(seed)
        self.hyperparameters = hyperparameters

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net.up, mesh=mesh)
            fully_shard(self.net, mesh=mesh)
        else:
            fsdp = partial(FullyShardedDataParallel, device_id=torch.device("cpu"), use_orig_params=True)
            self.net.up = fsdp(self.net.up)
            self.net = fsdp(self.net)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups_of(self, *self.hyperparameters))

    def training_step(self, batch: torch.Tensor, _index: int) -> torch.Tensor:
        return loss_of(self.net, int(batch))


class FSDPStrategyOnCpu(FSDPStrategy):
    """Lightning refuses this very class where it has no GPU, and not the classes derived from it."""


class Loading(pytorch_lightning.Callback):
    """Loads the optimizer's state before the first step."""

    def __init__(self, checkpoint: str) -> None:
        self.checkpoint = checkpoint

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        checkpoint = self.checkpoint
        shardferry.load_optimizer_state(module, trainer.optimizers[0], checkpoint, optimizer_key="optimizer_0")


class Writing(pytorch_lightning.Callback):
    """Writes the optimizer's whole state before the first step, and ends the training."""

    def __init__(self, whole_state: str) -> None:
        self.whole_state = whole_state

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        write_whole_state(module, trainer.optimizers[0], self.whole_state)
        trainer.should_stop = True


def save(checkpoint: str, whole_state: str, strategy: str) -> None:
    trainer = make_trainer(strategy, max_steps=3)
    trainer.fit(Module(0, DECAYED, UNDECAYED), batches())
    trainer.save_checkpoint(checkpoint)
    write_whole_state(trainer.lightning_module, trainer.optimizers[0], whole_state)


def load(checkpoint: str, whole_state: str, strategy: str) -> None:
    trainer = make_trainer(strategy, max_steps=1, callbacks=[Loading(checkpoint), Writing(whole_state)])
    trainer.fit(Module(1, OTHERS, OTHERS), batches())


def resume(checkpoint: str, whole_state: str, strategy: str) -> None:
    """Lightning's own way to load, which calls torch's function; here it is given ours."""
    torch.distributed.checkpoint.optimizer.load_sharded_optimizer_state_dict = (
        shardferry.dcp.load_sharded_optimizer_state_dict
    )
    trainer = make_trainer(strategy, max_steps=9, callbacks=[Writing(whole_state)])
    trainer.fit(Module(1, OTHERS, OTHERS), batches(), ckpt_path=checkpoint)


def make_trainer(strategy: str, **arguments: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=make_strategy(strategy),
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


def make_strategy(name: str) -> Strategy:
    if name == "FSDPStrategy":
        return FSDPStrategyOnCpu(state_dict_type="sharded", use_orig_params=True)
    return ModelParallelStrategy(data_parallel_size=dist.get_world_size(), tensor_parallel_size=1)


def batches() -> DataLoader[torch.Tensor]:
    return DataLoader(torch.arange(3), batch_size=1)
