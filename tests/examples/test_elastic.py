"""Ray Train on nodes that come and go, from kept state, against a run that was not interrupted and wraps nothing."""

from __future__ import annotations

import re
from itertools import groupby

import pytest

from examples.elastic import SAVED_AT, SHOWN, UNTIL
from examples.task import make_optimizer, network, train_step
from tests.support.commands import run_process
from tests.support.leftovers import nothing_left

PROGRAM = """
from examples.elastic import main
from tests.support.forked_workers import forked_workers

with forked_workers():
    main()
"""


@pytest.mark.slow
def test_goes_on_with_fewer_and_with_more_workers(quick_workers: None) -> None:
    with nothing_left():
        done = run_process(PROGRAM, python=("-c",), timeout_s=500)
    assert done.status == 0, done.stderr
    printed = re.findall(r"^step (\d+) loss (\S+) on (\d) workers$", done.stdout, re.MULTILINE)
    some, all_of_them = [SAVED_AT + 1 + step for step in range(SHOWN)], list(range(SAVED_AT + 1, UNTIL + 1))
    groups = [
        (workers, [int(step) for step, _, _ in lines]) for workers, lines in groupby(printed, lambda line: line[2])
    ]
    # Each begins where the kept state is. Of the two nodes that are added, Ray Train may take one before the other.
    assert groups[:2] == [("2", some), ("1", some)]
    assert groups[-1] == ("3", all_of_them)
    assert groups[2:-1] in ([], *([("2", some[:count])] for count in (1, 2)))

    model = network()
    optimizer = make_optimizer(model)
    uninterrupted = [train_step(model, optimizer, step) for step in range(UNTIL)]
    for step, loss, _ in printed:
        assert float(loss) == pytest.approx(uninterrupted[int(step) - 1], rel=1e-4)
