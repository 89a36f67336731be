"""The guard of a stage ends with the process that submitted the stage."""

from __future__ import annotations

import time
from typing import Any

import ray

from shardferry.actors.guard import NAMESPACE, Guard
from tests.support.leftovers import wait_while

_WATCHED_S = 1.0


def test_it_ends_if_its_submitter_dies_before_it_has_started(cluster: None) -> None:
    """Then nobody tells it what to watch, and as a detached actor it would stay until the cluster ends."""
    forgotten, watched = _started("forgotten"), _started("watched")
    watched.watch.remote([watched.never.remote()])
    ray.get([forgotten.record.remote(), watched.record.remote()])
    wait_while(lambda: "forgotten" in _names())
    assert "forgotten" not in _names()
    time.sleep(2 * _WATCHED_S)
    assert "watched" in _names(), "its submitter lives"
    ray.kill(watched)


def _started(name: str) -> Any:
    remote: Any = ray.remote(Guard)
    options = {"num_cpus": 0, "name": name, "namespace": NAMESPACE, "lifetime": "detached", "max_concurrency": 10}
    return remote.options(**options).remote(name, _WATCHED_S)


def _names() -> set[str]:
    return {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
