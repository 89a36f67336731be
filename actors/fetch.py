"""Bytes in Ray's object store, as a trainer fetches them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from shardferry.errors import HandoffError


@dataclass(frozen=True, slots=True)
class Fetch:
    """Gets chunks of a shard from Ray's object store."""

    world_rank: int
    timeout_s: float  # for one call
    node: str  # the address of the loader's node, for the error

    def __call__(self, chunks: Sequence[ray.ObjectRef[Any]]) -> Sequence[np.ndarray]:
        """The arrays. Raises HandoffError: they are lost, or don't come in time."""
        try:
            return ray.get(list(chunks), timeout=self.timeout_s)
        except ray.exceptions.GetTimeoutError as error:
            raise HandoffError(
                f"rank {self.world_rank}: bytes of its shard did not come from node {self.node} within timeouts.handoff_s = "
                f"{self.timeout_s:g} s"
            ) from error
        except ray.exceptions.RayError as error:
            raise HandoffError(
                f"rank {self.world_rank}: the bytes of its shard in the object store of node {self.node} are lost, as the node or "
                "the process that submitted the stage has died; load again"
            ) from error
