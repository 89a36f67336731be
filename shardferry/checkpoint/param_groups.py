"""Param groups keyed by parameter: rebuild them from a checkpoint, and fit them to a live optimizer.

A saved group says which FQNs it holds. Positions are never trusted: pipeline stages, freezing and re-wrapping change them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shardferry.checkpoint.catalog import KeyPath
from shardferry.errors import InstallError
from shardferry.state_dicts import nest

ParamGroup = dict[str, Any]  # "params": [fqn, ...], and the hyperparameters by name


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


def hyperparameters_for(fqns: Sequence[str], saved: Sequence[ParamGroup]) -> dict[str, Any]:
    """The hyperparameters that the checkpoint has for the parameters of one live group.

    Raises:
        InstallError: a parameter is in no saved group, or the parameters come from groups that differ.
    """
    owners = {fqn: index for index, group in enumerate(saved) for fqn in group.get("params", ())}
    missing = [fqn for fqn in fqns if fqn not in owners]
    if missing:
        raise InstallError(
            f"{missing[0]}: in none of the {len(saved)} saved param groups ({len(missing)} of the live group's {len(fqns)} "
            "parameters are missing there); the checkpoint was saved for another model"
        )
    found = [_without_params(saved[index]) for index in sorted({owners[fqn] for fqn in fqns})]
    for other in found[1:]:
        differing = sorted(name for name in {*found[0], *other} if not _same(found[0].get(name), other.get(name)))
        if differing:
            name = differing[0]
            raise InstallError(
                f"one live param group joins saved groups that differ in {name!r} "
                f"({found[0].get(name)!r} and {other.get(name)!r}); split the live group as it was saved"
            )
    return found[0] if found else {}


def _without_params(group: ParamGroup) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in ("params", "param_names")}


def _same(one: Any, other: Any) -> bool:
    return bool(type(one) is type(other) and one == other)
