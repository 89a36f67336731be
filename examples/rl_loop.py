"""A reinforcement-learning loop on Ray whose trainers hold all GPUs: an actor and a critic, each with an optimizer of its own.

    python -m examples.rl_loop

Four trainers learn, save and end. Two trainers with two GPUs each take over: the stage loads both models and both optimizers into
them in one go. It needs no GPU, as its loaders run beside the trainers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import shardferry
from shardferry.pipeline import OptimizerLoadStage
from shardferry.pipeline.result import StageResult
from shardferry.schemas import StageConfig

BEFORE, AFTER = 4, 2  # trainers
ITERATIONS = 8  # before, and after
SAMPLES, STATES, ACTIONS = 96, 16, 4

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # states, actions, rewards
SPEC = {"checkpoint": {"model_key": {"actor": "actor_model", "critic": "critic_model"}}}


# --- what is learned --------------------------------------------------------------------------------------------------


def make_models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        name: nn.Sequential(nn.Linear(STATES, 64), nn.Tanh(), nn.Linear(64, outputs))
        for name, outputs in (("actor", ACTIONS), ("critic", 1))
    }


def make_optimizers(models: dict[str, nn.Module]) -> dict[str, torch.optim.Optimizer]:
    rates = {"actor": 1e-2, "critic": 3e-2}
    return {name: torch.optim.AdamW(model.parameters(), lr=rates[name]) for name, model in models.items()}


@torch.no_grad()
def play(policy: nn.Module, iteration: int) -> Batch:
    """A task of one move: the action that the state's largest part stands for is rewarded."""
    dice = torch.Generator().manual_seed(iteration)
    states = torch.rand(SAMPLES, STATES, generator=dice)
    actions = torch.multinomial(policy(states).softmax(-1), 1, generator=dice).squeeze(-1)
    best = states.view(SAMPLES, ACTIONS, -1).sum(-1).argmax(-1)
    return states, actions, (actions == best).float()


def learn(models: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer], batch: Batch) -> None:
    """One step of the critic and one of the actor, on this rank's samples."""
    states, actions, rewards = batch
    values = models["critic"](states).squeeze(-1)
    (values - rewards).square().mean().backward()
    chosen = models["actor"](states).log_softmax(-1).gather(-1, actions[:, None]).squeeze(-1)
    (-(rewards - values.detach()) * chosen).mean().backward()
    for optimizer in optimizers.values():
        optimizer.step()
        optimizer.zero_grad()


# --- the actors -------------------------------------------------------------------------------------------------------


@ray.remote(num_cpus=1)
class Player:
    """Plays with the newest policy."""

    def __init__(self) -> None:
        self.policy = make_models()["actor"]

    def play(self, weights: dict[str, torch.Tensor], iteration: int) -> Batch:
        self.policy.load_state_dict(weights)
        return play(self.policy, iteration)


class Trainer(shardferry.OptimizerReceiver):
    """One rank: its shards of both models and of both optimizers."""

    def __init__(self, rank: int, world_size: int, rendezvous: str) -> None:
        store = dist.FileStore(rendezvous, world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        self.mine = slice(rank, None, world_size)
        mesh = init_device_mesh("cpu", (world_size,))
        self.models = {name: fully_shard(model, mesh=mesh) for name, model in make_models().items()}
        self.optimizers = make_optimizers(self.models)

    def shardferry_target(self) -> tuple[Any, Any]:
        """Each optimizer is loaded from the key that is its name here."""
        return self.models, self.optimizers

    def policy(self) -> dict[str, torch.Tensor]:
        """The whole weights; all ranks call it."""
        return get_model_state_dict(self.models["actor"], options=StateDictOptions(full_state_dict=True))

    def learn(self, batch: Batch) -> float:
        """Returns the mean reward."""
        learn(self.models, self.optimizers, tuple(part[self.mine] for part in batch))  # type: ignore[arg-type]
        return float(batch[2].mean())

    def save(self, path: str) -> None:
        state = {name: get_optimizer_state_dict(self.models[name], one) for name, one in self.optimizers.items()}
        weights = {f"{name}_model": get_model_state_dict(model) for name, model in self.models.items()}
        dcp.save(state | weights, checkpoint_id=path)


def start_trainers(world_size: int, rendezvous: Path) -> list[Any]:
    """Trainers that share all GPUs of the cluster."""
    actor = ray.remote(num_cpus=1, num_gpus=int(ray.cluster_resources()["GPU"]) / world_size)(Trainer)
    return [actor.remote(rank, world_size, str(rendezvous)) for rank in range(world_size)]


# --- the loop ---------------------------------------------------------------------------------------------------------


def loop(trainers: Sequence[Any], player: Any, iterations: Iterable[int]) -> list[float]:
    """Play and learn. Steps are joined by ObjectRefs. Returns the mean reward of each iteration."""
    rewards = []
    for iteration in iterations:
        policies = [trainer.policy.remote() for trainer in trainers]
        batch = player.play.remote(policies[0], iteration)
        rewards.append([trainer.learn.remote(batch) for trainer in trainers])
    return [per_rank[0] for per_rank in map(ray.get, rewards)]


def before(run: Path, player: Any) -> list[float]:
    """Learn, save, and free all GPUs."""
    trainers = start_trainers(BEFORE, run / "before")
    rewards = loop(trainers, player, range(ITERATIONS))
    ray.get([trainer.save.remote(str(run / "checkpoint")) for trainer in trainers])
    for trainer in trainers:
        ray.kill(trainer)
    return rewards


def after(run: Path, player: Any) -> tuple[list[float], StageResult]:
    """Take all GPUs, load, and learn on."""
    trainers = start_trainers(AFTER, run / "after")
    result = OptimizerLoadStage(StageConfig.model_validate(SPEC)).run(trainers, location=run / "checkpoint")
    rewards = loop(trainers, player, range(ITERATIONS, 2 * ITERATIONS))
    for trainer in trainers:
        ray.kill(trainer)
    return rewards, result


def main() -> None:
    """Run the loop on this machine, with four GPUs of which Ray is told."""
    if not ray.is_initialized():
        ray.init(address="local", num_gpus=4, num_cpus=8, include_dashboard=False, log_to_driver=False)
    player = Player.remote()
    with tempfile.TemporaryDirectory() as run:
        print(f"{BEFORE} trainers, reward {' '.join(f'{reward:.2f}' for reward in before(Path(run), player))}")
        rewards, result = after(Path(run), player)
        transports = {rank.transport for rank in result.report.ranks}
        print(
            f"loaded on {AFTER} by {', '.join(transports)}; {result.report.read_amplification:.2f} x the needed bytes read"
        )
        print(f"{AFTER} trainers, reward {' '.join(f'{reward:.2f}' for reward in rewards)}")


if __name__ == "__main__":
    main()
