"""Forked workers are workers of Ray's: real processes of their own, started in half a second, with what a task asks for."""

from __future__ import annotations

import os
import sys

import pytest
import ray


@ray.remote(num_cpus=0)
class Told:
    def tell(self) -> tuple[int, int, str | None, bool]:
        return os.getpid(), os.getppid(), os.environ.get("TOLD"), "torch" in sys.modules


@pytest.mark.usefixtures("cluster")
def test_workers_are_forked_from_one_process() -> None:
    actors = [Told.options(runtime_env={"env_vars": {"TOLD": str(i)}}).remote() for i in range(2)]
    told = ray.get([actor.tell.remote() for actor in actors])
    assert len({pid for pid, *_ in told}) == 2
    ((server, has_torch),) = {(parent, has_torch) for _, parent, _, has_torch in told}
    assert has_torch, "Ray has another way to start workers now: see tests/support/forked_workers.py"
    assert server != os.getpid()
    assert [variable for _, _, variable, _ in told] == ["0", "1"]
    ray.kill(actors[0])
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(actors[0].tell.remote())
    ray.kill(actors[1])
