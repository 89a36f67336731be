"""Find state that was saved by one rank alone, under the name of the whole.

A parameter of 8x4 on 2 ranks, and an ``exp_avg`` of 4x4 in one chunk: the moments of one rank. The other's were not saved.
"""

from __future__ import annotations

from collections.abc import Mapping

from shardferry.checkpoint.optimizer_state import SCALAR_STATE
from shardferry.plan.state_of_param import StateOfParam


def local_part_names(params: Mapping[str, StateOfParam]) -> frozenset[str]:
    """The state names under which one rank's part was saved as if it were the whole.

    A factor may happen to have the shape of a rank's part. So a name counts only where each parameter that is sharded has one
    chunk of such a shape under it.

    Args:
        params: by FQN.
    """
    parts: set[str] = set()
    others: set[str] = set(SCALAR_STATE)
    for param in params.values():
        if param.part_shapes:
            for name, saved in param.entries.items():
                is_part = len(saved.chunks) == 1 and saved.shape != param.shape and saved.shape in param.part_shapes
                (parts if is_part else others).add(name)
    return frozenset(parts - others)
