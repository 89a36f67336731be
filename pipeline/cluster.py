"""Connect a command to a Ray cluster, or start an embedded Ray for it."""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import torch

from shardferry.actors.logs import asked_format
from shardferry.actors.placement import place
from shardferry.errors import RankError, SpecError
from shardferry.schemas.stage_config import StageConfig

_CONNECT_S = 10.0


@contextmanager
def ray_for(config: StageConfig, world_size: int, *, address: str | None, num_gpus: int | None) -> Iterator[None]:
    """Connect to a cluster, or start an embedded Ray, for the time of the context.

    An already initialized Ray is used, and stays.

    Args:
        world_size: number of loaders; an embedded Ray gets CPUs for all of them.
        address: of a cluster; default: ``RAY_ADDRESS``, which is set inside a Ray job.
        num_gpus: of an embedded Ray; default: the number of this machine's GPUs, or if it has none, as many logical GPUs as
            the ranks need.

    Raises:
        SpecError: no cluster answers at the address, or the ranks need more GPUs than there are.
        RankError: Ray did not start.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if ray.is_initialized():
        yield
        return
    if address:
        check_reachable(address, config.timeouts.start_s)
        _init(f"Ray at {address!r}", address=address)
    else:
        _start_embedded(config, world_size, num_gpus)
    try:
        yield
    finally:
        ray.shutdown()


def reads_on_other_nodes(config: StageConfig, address: str | None = None) -> bool:
    """Whether loaders on other nodes than this one may read for each other what this node lacks.

    Args:
        address: of the cluster that will be connected to; default: ``RAY_ADDRESS``.
    """
    if config.read.strategy == "direct":
        return False
    if ray.is_initialized():
        return len([node for node in ray.nodes() if node["Alive"]]) > 1
    return bool(address or os.environ.get("RAY_ADDRESS"))


def check_reachable(address: str, timeout_s: float) -> None:
    """Raise SpecError if no process listens at the address. Ray itself retries silently."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # "auto", "local": words of Ray
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=min(timeout_s, _CONNECT_S)).close()
    except (OSError, OverflowError) as error:
        raise SpecError(
            f"address {address!r}: no Ray cluster answers there ({error}); give the head's host and port, or leave it out to "
            "start an embedded Ray"
        ) from None


def _start_embedded(config: StageConfig, world_size: int, num_gpus: int | None) -> None:
    asked = place(config, world_size, trainer_nodes=None, user=None)
    needed = math.ceil(world_size * asked.num_gpus)
    available = torch.cuda.device_count() or needed if num_gpus is None else num_gpus
    if needed > available:
        raise SpecError(
            f"topology.mesh: {world_size} ranks need {needed} GPUs, there are {available}; use a smaller mesh, "
            "or set actors.gpus_per_actor lower (0 loads on CPUs)"
        )
    cpus = max(os.cpu_count() or 1, int(world_size * asked.num_cpus) + 1)
    _init(
        "an embedded Ray",
        address="local",
        num_gpus=available,
        num_cpus=cpus,
        include_dashboard=False,
        log_to_driver=asked_format() is not None,  # the loaders' lines
    )


def _init(what: str, **options: Any) -> None:
    try:
        ray.init(**options, logging_level=logging.ERROR)
    except Exception as error:  # Ray has no class of its own for a node that doesn't start in time
        raise RankError(f"{what} did not start: {type(error).__name__}: {error}") from error
