"""What a stage asks of any actor, through ``__ray_call__``: a method that Ray gives every actor. It runs a function there."""

from __future__ import annotations

from typing import Any

import ray


def node_of_this_process(_actor: Any) -> str:
    """Ray's id of the node of the actor."""
    found: str = ray.get_runtime_context().get_node_id()
    return found
