"""The larger pipeline on half of its trainers, against a run that was not interrupted and wraps nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples import larger_pipeline
from examples.larger_pipeline import STEPS
from examples.task import make_optimizer, network, train_step
from tests.support.leftovers import nothing_held


@pytest.mark.usefixtures("cluster")
def test_evaluates_picks_loads_trains_saves_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(larger_pipeline, "YESTERDAY", 2)
    monkeypatch.setattr(larger_pipeline, "TODAY", 1)
    with nothing_held():
        losses = larger_pipeline.yesterday(tmp_path)
        outcome = larger_pipeline.today(tmp_path)

    assert Path(outcome.picked).name == f"step-{STEPS:06}"  # the one after has no metadata, those before lose more
    assert outcome.steps_loaded == STEPS
    model = network()
    optimizer = make_optimizer(model)
    uninterrupted = [train_step(model, optimizer, step) for step in range(2 * STEPS)]
    assert losses + outcome.losses == pytest.approx(uninterrupted, rel=1e-5)
    assert larger_pipeline.complete(tmp_path)[-1] == outcome.saved == str(tmp_path / f"step-{2 * STEPS:06}")
    report = json.loads(outcome.report.read_text())
    assert report["world_size"] == 1
    assert report["unique_bytes_needed"] <= report["storage_bytes_read"]
