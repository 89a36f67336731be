"""The hyperparameters of a live param group after a load: the saved ones of its parameters, or the live ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from shardferry.config import HyperparameterPolicy
from shardferry.errors import InstallError
from shardferry.plan.match_keys import Overwritten
from shardferry.state_dicts import ParamGroup


@dataclass(frozen=True)
class GroupValues:
    """New hyperparameters of one live param group."""

    values: Mapping[str, Any] = field(default_factory=dict)
    warning: str = ""  # why the live ones stay


def group_values(
    fqns: Sequence[str],
    saved: Sequence[ParamGroup],
    live: Mapping[str, Any],
    known: Collection[str],
    policy: HyperparameterPolicy,
) -> GroupValues:
    """What a load changes of a live param group.

    Parameters that are in no saved group, as where pipeline stages have overwritten each other's, take the hyperparameters
    that all saved groups agree on.

    Args:
        fqns: of the group's parameters.
        saved: the saved param groups.
        live: the live group.
        known: names of the hyperparameters that the optimizer's constructor has; others are labels, which may differ.

    Raises:
        InstallError: the parameters come from groups that contradict each other.
    """
    if policy.live is None or not fqns or not saved:
        return GroupValues()
    owners = {fqn: index for index, group in enumerate(saved) for fqn in group.get("params", ())}
    found = sorted({owners[fqn] for fqn in fqns if fqn in owners})
    ownerless = [fqn for fqn in fqns if fqn not in owners]
    chosen = [_hyperparameters(saved[index], policy) for index in (range(len(saved)) if ownerless else found)]
    values: dict[str, Any] = {}
    for group in chosen:
        for name, value in group.items():
            if name not in values or same(values[name], value):
                values.setdefault(name, value)
            elif name in known:
                if ownerless:
                    return GroupValues(warning=_ownerless(ownerless, len(saved), name))
                raise InstallError(
                    f"{fqns[0]}, {len(fqns) - 1} others: one live param group joins saved groups that differ in {name!r} "
                    f"({values[name]!r} and {value!r}); split the live group as it was saved, or keep the live values with "
                    f"hyperparameters: live, or {{live: [{name}]}}"
                )
            else:  # a label, such as a name: the live group has its own
                values[name] = live.get(name, values[name])
    return GroupValues({name: _placed(value, live.get(name)) for name, value in values.items()})


def _ownerless(fqns: Sequence[str], num_groups: int, name: str) -> str:
    return (
        f"{fqns[0]}: in none of the {num_groups} saved param groups ({len(fqns)} parameters are not), and these differ in "
        f"{name!r}; the live hyperparameters stay. Pipeline stages that save unflattened overwrite each other's groups: save "
        "with flatten_optimizer_state_dict=True"
    )


def _hyperparameters(group: ParamGroup, policy: HyperparameterPolicy) -> dict[str, Any]:
    return {
        name: value for name, value in group.items() if name not in ("params", "param_names") and not policy.keeps(name)
    }


def _placed(value: Any, live: Any) -> Any:
    """A hyperparameter that is a tensor in the live group stays one, with its dtype and on its device."""
    if not isinstance(live, torch.Tensor):
        return value
    if isinstance(value, torch.Tensor):
        return value.to(live.device)
    is_number = isinstance(value, int | float)
    return torch.full_like(live, value) if is_number else value


def same(one: Any, other: Any) -> bool:
    """Whether two hyperparameters are equal; tensors and arrays by their elements."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and bool((one.cpu() == other.cpu()).all())
    if type(one) is not type(other):
        return False
    equal = one == other
    return bool(equal.all()) if hasattr(equal, "all") else bool(equal)


def may_change_entries(change: Overwritten) -> bool:
    """Whether the optimizer may make other state under the new value: with momentum 0 it needs no buffer, say."""
    values = (change.old, change.new)
    return not all(isinstance(value, int | float) and not isinstance(value, bool) and value != 0 for value in values)


def overwritten(group: int, live: Mapping[str, Any], values: Mapping[str, Any]) -> list[Overwritten]:
    """What the new values change of a live group."""
    return [
        Overwritten(group, name, live.get(name), value)
        for name, value in values.items()
        if name not in live or not same(live[name], value)
    ]
