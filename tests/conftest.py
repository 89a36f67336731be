"""Fixtures shared by all tests, and how many examples property tests try.

``SHARDFERRY_EXAMPLES``: ``fast`` (the default) or ``full``, which .ci/run asks for.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"  # before ray is imported: tests leave no token in anybody's home
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# By default all other processes, as those of other tests, come before Ray's workers.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112

import hypothesis
import pytest
import ray

from tests.support.forked_workers import forked_workers
from tests.support.leftovers import MARK
from tests.support.models import save_fsdp2
from tests.support.ranks import RankPool
from tests.support.scheduling import LongestFirst, place_of

os.environ[MARK] = str(os.getpid())

hypothesis.settings.register_profile("fast", max_examples=100, deadline=None)
hypothesis.settings.register_profile("full", max_examples=500, deadline=None)
hypothesis.settings.load_profile(os.environ.get("SHARDFERRY_EXAMPLES", "fast"))

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Several processes take the longest tests first; one alone keeps the order of the files."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: place_of(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LongestFirst:
    """How ``pytest -n 3`` shares the tests among processes."""
    return LongestFirst(config, log)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Up to 8 real processes with gloo."""
    pool = RankPool(8)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def saved_by(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Checkpoints of the same FSDP2 model, saved by stock torch on 1 to 8 ranks, by number of ranks."""
    paths = {}
    for num_ranks in (1, 2, 3, 4, 5, 6, 8):
        paths[num_ranks] = tmp_path_factory.mktemp(f"saved-by-{num_ranks}") / "ckpt"
        ranks.run(num_ranks, save_fsdp2, str(paths[num_ranks]))
    return paths


@pytest.fixture(scope="session")
def quick_workers() -> Iterator[None]:
    """The raylets that this process starts fork their workers from a process that has imported torch."""
    with forked_workers():
        yield


@pytest.fixture(scope="session")
def cluster(quick_workers: None) -> Iterator[None]:
    """A real Ray of this process's own, with 4 logical GPUs.

    Its workers inherit PYTHONPATH: with a runtime environment in its place, Ray starts each of them twice.
    """
    with tempfile.TemporaryDirectory(prefix="sf-ray-") as directory:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("PYTHONPATH", str(REPOSITORY), prepend=os.pathsep)
            ray.init(
                address="local",
                num_cpus=12,
                num_gpus=4,
                include_dashboard=False,
                log_to_driver=False,
                object_store_memory=256 * 1024 * 1024,
                _temp_dir=directory,
            )
        yield
        ray.shutdown()
