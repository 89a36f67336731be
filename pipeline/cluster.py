"""The Ray that a command runs on: the one that is there, or one of its own."""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import ray
import torch

from shardferry.errors import SpecError
from shardferry.schemas.stage_config import StageConfig

_CONNECT_S = 10.0


@contextmanager
def ray_for(config: StageConfig, world_size: int, *, address: str | None, num_gpus: int | None) -> Iterator[None]:
    """Connect to a cluster, or start one in this process and take it down afterwards.

    Args:
        address: of a cluster; default: ``RAY_ADDRESS``, which is set inside a Ray job.
        num_gpus: of an embedded Ray; default: this machine's GPUs, or where it has none as many logical ones as the
            ranks need.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if ray.is_initialized():
        yield
        return
    if address:
        _check_reachable(address, config.timeouts.start_s)
        ray.init(address=address, logging_level=logging.ERROR)
    else:
        _start_embedded(config, world_size, num_gpus)
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str, timeout_s: float) -> None:
    """Ray itself goes on trying without a word. Raises SpecError where nobody listens."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # "auto", "local": for Ray to understand
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=min(timeout_s, _CONNECT_S)).close()
    except (OSError, OverflowError) as error:
        raise SpecError(
            f"address {address!r}: no Ray cluster answers there ({error}); give the head's host and port, or leave it out for a "
            "Ray of this command's own"
        ) from None


def _start_embedded(config: StageConfig, world_size: int, num_gpus: int | None) -> None:
    wanted = math.ceil(world_size * config.actors.gpus_per_actor)
    there = torch.cuda.device_count() or wanted if num_gpus is None else num_gpus
    if wanted > there:
        raise SpecError(
            f"topology.mesh: {world_size} ranks need {wanted} GPUs, there are {there}; use a smaller mesh, "
            "or set actors.gpus_per_actor lower (0 loads on CPUs)"
        )
    cpus = max(os.cpu_count() or 1, int(world_size * config.actors.cpus_per_actor) + 1)
    ray.init(
        address="local",
        num_gpus=there,
        num_cpus=cpus,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
