"""Param groups keyed by parameter: rebuild them from a checkpoint.

A saved group says which FQNs it holds. Positions are never trusted: pipeline stages, freezing and re-wrapping change them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardferry.checkpoint.catalog import KeyPath
from shardferry.state_dicts import ParamGroup, nest


def build_param_groups(entries: Mapping[KeyPath, Any]) -> list[ParamGroup]:
    """Rebuild the saved param groups.

    Args:
        entries: saved values by their path below ``param_groups``: ``(0, "lr")`` for a flattened list of groups, ``()``
            for a list saved whole, ``("<fqn>.lr",)`` where the saver had flattened the optimizer's state dict.
    """
    if () in entries:
        return [dict(group) for group in entries[()]]
    flattened: dict[str, ParamGroup] = {}
    nested: dict[KeyPath, Any] = {}
    for path, value in entries.items():
        if len(path) == 1 and isinstance(path[0], str):
            fqn, _, name = path[0].rpartition(".")
            flattened.setdefault(fqn, {"params": [fqn]})[name] = value
        else:
            nested[path] = value
    groups: list[ParamGroup] = nest(nested) or []
    return groups + [flattened[fqn] for fqn in sorted(flattened)]
