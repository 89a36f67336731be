"""``checkpoint.model_location``: the optimizer of one directory, the weights of another, in a dry run and in a stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from shardferry.errors import PlanError, SpecError
from shardferry.pipeline.stage import OptimizerLoadStage
from shardferry.schemas.stage_config import StageConfig
from tests.support.alone import save_alone
from tests.support.commands import Command
from tests.support.small_net import Net, adamw, fill


@pytest.fixture
def apart(tmp_path: Path) -> tuple[Path, Path, Net]:
    """An optimizer's checkpoint with other weights in it, and that of the weights."""
    fill(model := Net(), optimizer := adamw(model))
    wrong = {name: torch.full_like(weight, -1.0) for name, weight in model.state_dict().items()}
    save_alone({"optim": get_optimizer_state_dict(model, optimizer), "model": wrong}, tmp_path / "optimizer")
    save_alone({"model": model.state_dict()}, tmp_path / "model")
    return tmp_path / "optimizer", tmp_path / "model", model


def config(optimizer: Path, weights: Path, **more: object) -> StageConfig:
    checkpoint = {"location": str(optimizer), "model_key": "model", "model_location": str(weights), **more}
    return StageConfig.from_values({"checkpoint": checkpoint, "topology": {"mesh": {"dp": 1}}}, source="test")


def test_a_dry_run_counts_the_bytes_of_both(shardferry: Command, apart: tuple[Path, Path, Net], tmp_path: Path) -> None:
    optimizer, weights, _ = apart
    reports = []
    for elsewhere in (weights, None):
        spec = tmp_path / "stage.json"
        checkpoint = {"location": str(optimizer), "model_key": "model"}
        checkpoint |= {"model_location": str(elsewhere)} if elsewhere else {}
        spec.write_text(json.dumps({"checkpoint": checkpoint, "topology": {"mesh": {"dp": 2}}}))
        done = shardferry("plan", spec, "--json")
        assert done.status == 0, done.stderr
        reports.append(json.loads(done.stdout))
    apart_report, together = reports
    assert apart_report["model_location"] == str(weights)
    assert together["model_location"] is None
    assert apart_report["num_tensors"] == together["num_tensors"]
    assert apart_report["ranks"][1]["bytes_needed"] == together["ranks"][1]["bytes_needed"]


@pytest.mark.usefixtures("cluster")
def test_a_stage_takes_the_weights_of_the_other_directory(apart: tuple[Path, Path, Net]) -> None:
    optimizer, weights, model = apart
    result = OptimizerLoadStage(config(optimizer, weights)).run()
    with result.handles[0].open() as shard:
        for name, weight in model.named_parameters():
            assert torch.equal(shard.model_state_dict()[name], weight), name
    assert result.report.model_location == str(weights)
    assert any("<model_location>" in file for file in result.report.ranks[0].file_bytes)
    result.close()


def test_errors_name_the_other_directory(apart: tuple[Path, Path, Net]) -> None:
    optimizer, weights, _ = apart
    with pytest.raises(SpecError, match="model_location is given without model_key"):
        config(optimizer, weights, model_key=None)
    with pytest.raises(
        PlanError, match=f"{weights}: nothing is saved under model_key 'net'; top-level keys are 'model'"
    ):
        OptimizerLoadStage(config(optimizer, weights, model_key="net")).submit()


def unfilled() -> tuple[Net, torch.optim.Optimizer]:
    """A model whose weights are all wrong."""
    model = Net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(-2.0)
    return model, adamw(model)


def weights_of(trainer: Any) -> dict[str, torch.Tensor]:
    model, optimizer = trainer.shardferry_target()
    assert len(optimizer.state) == len(list(model.parameters()))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("transport", ["in_process", "shared_memory", "object_store"])
def test_trainers_get_both(
    apart: tuple[Path, Path, Net], trainers_with: Callable[..., list[Any]], transport: str
) -> None:
    optimizer, weights, model = apart
    checkpoint = {"location": str(optimizer), "model_key": "model", "model_location": str(weights)}
    values = {"checkpoint": checkpoint, "handoff": {"transport": transport}}
    trainers = trainers_with(unfilled)
    result = OptimizerLoadStage(StageConfig.from_values(values, source="test")).run(trainers)
    assert result.report.model_location == str(weights)
    for found in ray.get([trainer.do.remote(weights_of) for trainer in trainers]):
        for name, weight in model.named_parameters():
            assert torch.equal(found[name], weight), name
