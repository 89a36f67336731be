"""What a stage asks of any actor, through ``__ray_call__``: a method that Ray gives every actor. It runs a function there."""

from __future__ import annotations

from typing import Any

import ray

from shardferry.actors.rank_report import measures_of_this_process


def node_of_this_process(_actor: Any) -> str:
    """Ray's id of the node of the actor."""
    found: str = ray.get_runtime_context().get_node_id()
    return found


def measures_of_trainer(_actor: Any, device: str) -> dict[str, Any]:
    """As `measures_of_this_process`, of the actor's process."""
    return measures_of_this_process(device)
