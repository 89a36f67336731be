"""The example: a stage between two steps of somebody else's."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples import larger_pipeline


@pytest.mark.usefixtures("cluster")
def test_picks_the_newest_complete_checkpoint_and_trains_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With half of its trainers."""
    monkeypatch.setattr(larger_pipeline, "YESTERDAY", 2)
    monkeypatch.setattr(larger_pipeline, "TODAY", 1)
    losses = larger_pipeline.yesterday(tmp_path)
    outcome = larger_pipeline.today(tmp_path, losses)
    assert Path(outcome.location).name == f"step-{larger_pipeline.STEPS}"
    assert outcome.steps_loaded == larger_pipeline.STEPS
    assert outcome.today[0] < outcome.yesterday[-1]
    assert outcome.today[-1] < outcome.today[0]
