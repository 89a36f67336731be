"""Train on 4 processes, save, load on 2 through the stage, train further; do the same with stock torch, and compare losses."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from shardferry.errors import SpecError
from shardferry.pipeline.cluster import ray_for
from shardferry.pipeline.demo.pretraining import pretrain
from shardferry.pipeline.demo.trainer import DemoTrainer
from shardferry.pipeline.display import byte_progress, human_bytes, print_table, show_ranks
from shardferry.pipeline.stage import OptimizerLoadStage
from shardferry.schemas.stage_config import StageConfig
from shardferry.schemas.stage_report import StageReport

SAVED_ON, LOADED_ON = 4, 2  # ranks
PRETRAINED_STEPS, FURTHER_STEPS = 20, 8
_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Ending:
    """The second half of training."""

    losses: list[list[float]]  # by rank
    load_s: float


def tell(directory: Path | None) -> bool:
    """Run the demo and print its tables.

    Args:
        directory: gets the checkpoint, as ``checkpoint``; default: a temporary directory.

    Returns:
        Whether all losses are equal.

    Raises:
        SpecError: the directory has a ``checkpoint`` already.
    """
    if directory is not None and (directory / "checkpoint").exists():
        raise SpecError(f"{directory / 'checkpoint'}: exists already; remove it or choose another --directory")
    with tempfile.TemporaryDirectory(prefix="shardferry-demo-") as scratch:
        checkpoint = (directory or Path(scratch)).absolute() / "checkpoint"
        start = time.time()
        print(
            f"training a GPT on {SAVED_ON} processes for {PRETRAINED_STEPS} steps (FSDP2, AdamW, two param groups)",
            flush=True,
        )
        before = pretrain(checkpoint, world_size=SAVED_ON, num_steps=PRETRAINED_STEPS)
        print(
            f"saved by stock dcp.save after {time.time() - start:.1f} s; loss {before[0]:.4f} -> {before[-1]:.4f}",
            flush=True,
        )
        config = StageConfig.model_validate({"checkpoint": {"location": str(checkpoint)}})
        with ray_for(config, 2 * LOADED_ON, address=None, num_gpus=None):
            trainers = _start_trainers(Path(scratch) / "rendezvous")
            report, ours = _through_the_stage(config, trainers)
            control = _with_stock_torch(checkpoint, trainers)
    _print_losses(ours, control)
    _print_report(report, ours, control)
    same = ours.losses == control.losses
    print("losses are equal, bit for bit" if same else "LOSSES DIFFER")
    return same


def _start_trainers(rendezvous: Path) -> list[Any]:
    """Actors for both endings: the processes, and what they have imported, are the same."""
    actor = ray.remote(num_cpus=1, num_gpus=1)(DemoTrainer)
    return [actor.remote(rank, LOADED_ON, str(rendezvous)) for rank in range(LOADED_ON)]


def _through_the_stage(config: StageConfig, trainers: list[Any]) -> tuple[StageReport, Ending]:
    print(f"loading on {LOADED_ON} ranks through the stage", flush=True)
    weights = [trainer.load_model.remote(config.checkpoint.location) for trainer in trainers]
    ray.get(weights, timeout=_TIMEOUT_S)
    start = time.time()
    with byte_progress("optimizer state") as bar:
        result = OptimizerLoadStage(config).run(trainers, on_progress=lambda ranks: show_ranks(bar, ranks))
        took = time.time() - start
    return result.report, Ending(_train_on(trainers), took)


def _with_stock_torch(checkpoint: Path, trainers: list[Any]) -> Ending:
    print(f"the control: stock dcp.load on {LOADED_ON} ranks", flush=True)
    ray.get([trainer.start_over.remote() for trainer in trainers], timeout=_TIMEOUT_S)
    start = time.time()
    ray.get([trainer.load_all.remote(str(checkpoint)) for trainer in trainers], timeout=_TIMEOUT_S)
    took = time.time() - start
    return Ending(_train_on(trainers), took)


def _train_on(trainers: list[Any]) -> list[list[float]]:
    steps = (PRETRAINED_STEPS, PRETRAINED_STEPS + FURTHER_STEPS)
    losses: list[list[float]] = ray.get([trainer.train.remote(*steps) for trainer in trainers], timeout=_TIMEOUT_S)
    return losses


def _print_losses(ours: Ending, control: Ending) -> None:
    rows = [
        (PRETRAINED_STEPS + step, repr(one), repr(other), "equal" if one == other else "DIFFERENT")
        for step, (one, other) in enumerate(zip(ours.losses[0], control.losses[0], strict=True))
    ]
    print_table(
        f"training on, {SAVED_ON} -> {LOADED_ON} ranks", ("step", "loss, Shardferry", "loss, stock dcp.load", ""), rows
    )


def _print_report(report: StageReport, ours: Ending, control: Ending) -> None:
    rows = [
        ("bytes needed (each once)", human_bytes(report.unique_bytes_needed)),
        ("bytes read from storage", human_bytes(report.storage_bytes_read)),
        ("read amplification", f"{report.read_amplification:.4f}"),
        ("requests", report.num_requests),
        ("hand-over", ", ".join(sorted({rank.transport for rank in report.ranks}))),
        *((f"seconds, {name}", f"{seconds:.4f}") for name, seconds in report.phases.items()),
        ("seconds, stage in all", f"{ours.load_s:.2f}"),
        ("seconds, control (weights too, actors up)", f"{control.load_s:.2f}"),
    ]
    print_table("the stage", ("", "value"), rows)
