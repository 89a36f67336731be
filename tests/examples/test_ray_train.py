"""Ray Train on two nodes of which one is killed, against a run that was not interrupted and wraps nothing."""

from __future__ import annotations

import re

import pytest

from examples.task import make_optimizer, network, train_step
from tests.support.commands import run_process
from tests.support.leftovers import nothing_left

SHORT = """
from examples.ray_train import main
from tests.support.forked_workers import forked_workers

with forked_workers():
    main(is_short=True)
"""


@pytest.mark.slow
def test_goes_on_with_the_worker_that_is_left(quick_workers: None) -> None:
    with nothing_left():
        done = run_process(SHORT, python=("-c",), timeout_s=500)
    assert done.status == 0, done.stderr
    printed = re.findall(r"^step +(\d+) loss (\S+) on (\d) workers$", done.stdout, re.MULTILINE)
    assert [int(step) for step, _, _ in printed] == list(range(1, 11))
    workers = "".join(number for _, _, number in printed)
    assert re.fullmatch("2+1+", workers), workers

    model = network()
    optimizer = make_optimizer(model)
    uninterrupted = [train_step(model, optimizer, step) for step in range(10)]
    assert [float(loss) for _, loss, _ in printed] == pytest.approx(uninterrupted, rel=1e-5)
