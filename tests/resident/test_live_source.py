"""What living trainers hold becomes the state of other trainers, in another topology, without storage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from shardferry.errors import InstallError, PlanError, SpecError
from shardferry.pipeline import OptimizerLoadStage
from shardferry.schemas import StageConfig
from tests.support.leftovers import nothing_held
from tests.support.models import SHAPES
from tests.support.trainers import never_stepped, start_trainers

pytestmark = pytest.mark.usefixtures("cluster")

NUM_ELEMENTS = 2 * sum(torch.Size(shape).numel() for shape in SHAPES.values())


def stage(location: Path | None = None, **handoff: Any) -> OptimizerLoadStage:
    checkpoint = {"model_key": "model"} | ({} if location is None else {"location": str(location)})
    return OptimizerLoadStage(StageConfig.model_validate({"checkpoint": checkpoint, "handoff": handoff}))


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    model, _ = trainer.shardferry_target()
    return {name: tensor.full_tensor().detach() for name, tensor in model.state_dict().items()}


def test_fewer_trainers_take_over(
    saved_by: dict[int, Path], trainers_with: Callable[..., list[Any]], tmp_path: Path
) -> None:
    old = trainers_with(never_stepped)
    (new,) = start_trainers(1, str(tmp_path / "store"))
    with nothing_held():
        ray.get(new.begin.remote(never_stepped))
        with pytest.raises(InstallError, match="the optimizer has no state for it yet; a source has taken a step"):
            stage().run([new], source=old)
        stage(saved_by[4]).run(old)
        for transport in ("auto", "in_process"):
            ray.get(new.begin.remote(never_stepped))
            report = stage(transport=transport).run([new], source=old).report
            assert ray.get(new.check.remote()) == NUM_ELEMENTS
            assert report.location.startswith("shardferry+memory://")
        before, after = ray.get([old[0].do.remote(weights), old[1].do.remote(weights)]), ray.get(new.do.remote(weights))
        for fqn, tensor in before[0].items():
            assert torch.equal(after[fqn], tensor), fqn
        ray.get(new.begin.remote(never_stepped))
        with pytest.raises(
            PlanError, match="144 of 288 wanted elements are in no saved chunk"
        ):  # the half of rank 1 is lost
            stage().run([new], source=old[:1])
        with pytest.raises(SpecError, match="source: is given beside location"):
            stage().run([new], saved_by[4], source=old)
        ray.get([trainer.begin.remote(never_stepped) for trainer in old])
        ray.kill(new)
