"""The example: a stage between two steps of somebody else's."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples import larger_pipeline


@pytest.mark.usefixtures("cluster")
def test_picks_the_newest_complete_checkpoint_and_trains_on(tmp_path: Path) -> None:
    losses = larger_pipeline.yesterday(tmp_path)
    outcome = larger_pipeline.today(tmp_path, losses)
    assert Path(outcome.location).name == f"step-{larger_pipeline.STEPS}"
    assert outcome.steps_loaded == larger_pipeline.STEPS
    assert outcome.today[0] < outcome.yesterday[-1]
    assert outcome.today[-1] < outcome.today[0]
