"""The class that a loader has for Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from shardferry.actors.loader import Loader
from shardferry.actors.loader_actor import METHODS, LoaderActor
from tests.support.commands import REPOSITORY
from tests.support.leftovers import nothing_left

# Its workers import for themselves: those of the fixture `cluster` are forked from a process that has torch.
_PROGRAM = """
import sys, ray
from shardferry.actors.guard import NAMESPACE
from shardferry.pipeline import OptimizerLoadStage
from shardferry.schemas import StageConfig
ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False)
values = {"checkpoint": {"location": sys.argv[1]}, "topology": {"mesh": {"dp": 1}}}
loading = OptimizerLoadStage(StageConfig.model_validate(values)).submit()
handles = ray.get(loading.refs, timeout=120)
names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
guard = ray.get_actor(next(name for name in names if ":rank" not in name), NAMESPACE)
print("modules", ray.get(guard.__ray_call__.remote(lambda _: sorted(sys.modules))))
loading.close()
ray.shutdown()
"""


def test_it_has_the_methods_of_a_loader() -> None:
    public = {name for name, value in vars(Loader).items() if callable(value) and not name.startswith("_")}
    assert set(METHODS) == public
    assert all(callable(getattr(LoaderActor, name)) for name in METHODS)


def test_the_guard_passes_handles_without_torch(saved_by: dict[int, Path]) -> None:
    with nothing_left():
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM, str(saved_by[4])],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=250,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    (modules,) = (line for line in done.stdout.splitlines() if line.startswith("modules "))
    assert "'shardferry.actors.loader_actor'" in modules, "a handle has passed"
    assert "'torch'" not in modules
