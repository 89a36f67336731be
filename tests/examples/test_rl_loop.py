"""The loop on half of its trainers, against one that was not interrupted and wraps nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from examples import rl_loop
from examples.rl_loop import ITERATIONS, learn, make_models, make_optimizers, play
from tests.support.leftovers import nothing_held


@pytest.mark.usefixtures("cluster")
def test_two_optimizers_reach_trainers_that_hold_all_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rl_loop, "BEFORE", 2)
    monkeypatch.setattr(rl_loop, "AFTER", 1)
    with nothing_held():
        player = rl_loop.Player.remote()
        rewards = rl_loop.before(tmp_path, player)
        further, result = rl_loop.after(tmp_path, player)
        ray.kill(player)

    models = make_models()
    optimizers = make_optimizers(models)
    uninterrupted = []
    for iteration in range(2 * ITERATIONS):
        batch = play(models["actor"], iteration)
        learn(models, optimizers, batch)
        uninterrupted.append(float(batch[2].mean()))
    assert rewards + further == pytest.approx(uninterrupted)
    assert further[-1] > rewards[0]
    assert result.report.world_size == 1
