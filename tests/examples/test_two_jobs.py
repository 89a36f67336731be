"""One job loads and keeps; others attach, also after a kill and with another number of ranks; the checkpoint is gone."""

from __future__ import annotations

import pytest
import ray

import shardferry
from examples import two_jobs
from shardferry.actors.resident.kept import drop
from tests.support.leftovers import nothing_held


@pytest.mark.usefixtures("cluster")
def test_the_story() -> None:
    with nothing_held():
        expected, losses, ranks = two_jobs.tell(ray.get_runtime_context().gcs_address)
        assert losses == [expected] * 2
        assert ranks == 3
        assert [state.name for state in shardferry.kept()] == [two_jobs.NAME]
        drop(two_jobs.NAME)
