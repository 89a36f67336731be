"""Find an optimizer's keys among a checkpoint's, and where each value stood in the state dict that was saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from shardferry.errors import PlanError
from shardferry.state_dicts import KeyPath, nest


def optimizer_paths(
    keys: Iterable[str], recorded: Mapping[str, Any] | None, optimizer_key: str, *, location: str
) -> dict[str, KeyPath]:
    """The path of each of the optimizer's values, by key.

    Args:
        recorded: the paths that the writer noted (``planner_data``). Where it noted none, FQNs and state names are told
            from the dots: ``optim.state.<fqn>.<name>``.

    Raises:
        PlanError: nothing is saved under the optimizer's key.
    """
    recorded = recorded if isinstance(recorded, Mapping) else {}
    every = {key: _path(key, recorded.get(key), optimizer_key) for key in keys}
    paths = {key: path for key, path in every.items() if path[0] == optimizer_key}
    if not paths:
        there = sorted({str(path[0]).partition(".")[0] if len(path) == 1 else str(path[0]) for path in every.values()})
        raise PlanError(
            f"{location}: nothing is saved under optimizer_key {optimizer_key!r}; "
            f"top-level keys are {', '.join(map(repr, there)) or 'none'}"
        )
    return paths


def _path(key: str, recorded: Any, optimizer_key: str) -> KeyPath:
    path = tuple(recorded) if isinstance(recorded, tuple | list) and recorded else (key,)
    if len(path) > 1 or not key.startswith(optimizer_key + "."):
        return path
    tail = key.removeprefix(optimizer_key + ".")
    section, _, rest = tail.partition(".")
    fqn, _, name = rest.rpartition(".")
    return (optimizer_key, section, fqn, name) if section == "state" and fqn else (optimizer_key, tail)


def fqn_and_name(path: KeyPath) -> tuple[str, str]:
    """Of ``("optim", "state", fqn, name)``, or of ``("optim", "state.<fqn>.<name>")``; no FQN for what is no state."""
    if len(path) >= 4 and path[1] == "state":
        return str(path[2]), ".".join(map(str, path[3:]))
    section, _, rest = str(path[1] if len(path) == 2 else "").partition(".")
    fqn, _, name = rest.rpartition(".")
    return (fqn, name) if section == "state" else ("", "")


def nest_optimizer(paths: Mapping[str, KeyPath], values: Mapping[str, Any], optimizer_key: str) -> dict[str, Any]:
    """The state dict that was saved, of its values by key.

    A plain ``optimizer.state_dict()`` keys its state by integers, which torch's writer turns into strings. They are turned
    back where the param groups name parameters by integers.
    """
    nested: dict[str, Any] = nest({paths[key]: value for key, value in values.items()})
    optimizer = nested[optimizer_key]
    if isinstance(optimizer, dict) and _keyed_by_integers(optimizer):
        state = optimizer["state"]
        by_name = state if isinstance(state, dict) else dict(enumerate(state))
        optimizer["state"] = {int(key): entries for key, entries in by_name.items()}
    return nested


def _keyed_by_integers(optimizer: Mapping[str, Any]) -> bool:
    groups, state = optimizer.get("param_groups"), optimizer.get("state")
    if not isinstance(groups, list) or not isinstance(state, dict | list):
        return False
    named = [parameter for group in groups if isinstance(group, dict) for parameter in group.get("params", ())]
    return bool(named) and all(type(parameter) is int for parameter in named) and all(str(k).isdigit() for k in state)
