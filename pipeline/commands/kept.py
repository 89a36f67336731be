"""The command ``kept``: what is kept in the memory of a cluster."""

from __future__ import annotations

import dataclasses
import json
import logging
import os

import ray

from shardferry.actors.resident import kept
from shardferry.errors import SpecError
from shardferry.pipeline.cluster import check_reachable
from shardferry.pipeline.display import human_bytes, print_table

_CONNECT_S = 10.0


def list_kept(dropped: str | None, address: str | None, *, as_json: bool) -> None:
    """Drop one state, if asked, and print the others.

    Args:
        dropped: a name.
        address: of the cluster.

    Raises:
        SpecError: there is no cluster.
        HandoffError: nothing is kept under the name.
    """
    _connect(address or os.environ.get("RAY_ADDRESS"))
    if dropped is not None:
        kept.drop(dropped)
    states = [state for state in kept.kept() if state.name != dropped]
    if as_json:
        print(json.dumps({"kept": [dataclasses.asdict(state) for state in states]}, indent=2))
        return
    if not states:
        print("nothing is kept in this cluster")
        return
    rows = [
        (
            state.name,
            state.location,
            state.digest[:12],
            "" if state.step is None else f"{state.step:g}",
            state.topology,
            human_bytes(sum(state.bytes_per_node.values())),
            len(state.bytes_per_node),
            f"{state.age_s:.0f} s",
            f"{state.left_s:.0f} s",
            ", ".join(map(str, state.lost_ranks)) or "none",
        )
        for state in states
    ]
    print_table(
        "kept", ("name", "checkpoint", "digest", "step", "topology", "size", "nodes", "age", "left", "lost ranks"), rows
    )


def _connect(address: str | None) -> None:
    if ray.is_initialized():
        return
    if address is not None:
        check_reachable(address, _CONNECT_S)
    try:
        ray.init(address=address or "auto", logging_level=logging.ERROR, log_to_driver=False)
    except ConnectionError:
        raise SpecError("no Ray cluster runs here; give --address, or set RAY_ADDRESS") from None
