"""Fit saved param groups to a live optimizer: by parameter, as positions change with pipeline stages, freezing and re-wrapping."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardferry.checkpoint.optimizer_state import ParamGroup
from shardferry.errors import InstallError


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
