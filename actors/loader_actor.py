"""`Loader` as a Ray actor.

Ray imports an actor's class in each process that gets a handle of the actor. The guard gets one with each shard, and would take
some 3 s of CPU to import torch for it, in which the shards wait. So this module imports none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

METHODS = (
    "open_rendezvous",
    "join",
    "load",
    "handle",
    "chunks",
    "keep",
    "restore",
    "handle_for",
    "manifests",
    "step",
    "memory_file",
    "read",
    "progress",
    "stack",
)  # of `Loader`


class LoaderActor:
    """Has the methods of a `shardferry.actors.loader.Loader`, which it makes in its own process.

    Args:
        settings: a `shardferry.actors.loader.LoaderSettings`.
    """

    def __init__(self, settings: Any) -> None:
        from shardferry.actors.loader import Loader

        self.loader = Loader(settings)


def _forwarded(name: str) -> Callable[..., Any]:
    def method(self: LoaderActor, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.loader, name)(*args, **kwargs)

    method.__name__ = name
    return method


for _name in METHODS:
    setattr(LoaderActor, _name, _forwarded(_name))
