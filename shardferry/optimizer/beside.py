"""What an optimizer's state dict has that is of no parameter: entries beside ``state``, and state under keys of its own.

MADGRAD has its number of steps in ``state["k"]``, others have counters and schedules beside ``state``. Paths in the state dict
name them: ``("total",)``, ``("state", "k")``.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from shardferry.config import KeyPolicy
from shardferry.errors import InstallError
from shardferry.optimizer.forms import OptimizerForm
from shardferry.optimizer.shadow import twin, twins
from shardferry.state_dicts import flat_entries, map_leaves, with_keys_of


def check_beside(forms: Sequence[OptimizerForm], extras: Mapping[str, Any], policy: KeyPolicy) -> list[str]:
    """Compare what was saved with what the optimizers have, or will have after a step.

    Args:
        forms: of all optimizers that were saved under one key.
        extras: as saved, nested as in the state dict.

    Returns:
        Warnings: what stays live, and what no optimizer has.

    Raises:
        InstallError: one side has entries that the other hasn't, and the policy doesn't allow that; or several optimizers have
            an entry of a name that was saved once.
    """
    saved, warnings = _named(extras), []
    takers = Counter(name for form in forms for name in form.beside)
    for form in forms:
        kind = type(form.optimizer).__name__
        if several := [name for name in form.beside if name in saved and takers[name] > 1]:
            raise InstallError(
                f"{kind}.state_dict() has {several}, of no parameter; {takers[several[0]]} of the optimizers given have it, and one "
                "was saved. Save each optimizer under a key of its own, and give them as a dict {optimizer_key: optimizer}; "
                "nothing was changed"
            )
        if lacking := [name for name in form.beside if name not in saved]:
            where = "beside its parameters' state" if any(map(_is_state, lacking)) else "beside state"
            what = f"{kind}.state_dict() has {lacking} {where} and param_groups, which were not saved"
            if not policy.allow_missing:
                raise InstallError(
                    f"{what}: its next step would go by the live ones. Save its own state_dict(), or set keys: allow_missing to "
                    "keep the live ones; nothing was changed"
                )
            warnings.append(f"{what}; the live ones stay")
    if left := [name for name in saved if name not in takers and not _is_for_any(name, forms)]:
        kinds = ", ".join(type(form.optimizer).__name__ for form in forms)
        what = f"{left} were saved with the optimizer, of no parameter, and {kinds} has none of these"
        if any(map(_is_state, left)) and not policy.ignore_unexpected:
            raise InstallError(
                f"{what}. Give the optimizer that was saved, or set keys: ignore_unexpected; nothing was changed"
            )
        warnings.append(what)
    return warnings


def filled_beside(form: OptimizerForm, extras: Mapping[str, Any], *, without_memory: bool) -> dict[str, Any]:
    """What was saved of an optimizer's state dict, but for the state of parameters; what was not saved stays live.

    Args:
        without_memory: for a trial.

    Raises:
        InstallError: a tensor has another shape or dtype than was saved.
    """
    rest = {name: value for name, value in form.state_dict.items() if name not in ("state", "param_groups")}
    filled: dict[str, Any] = {**(twins(rest) if without_memory else rest), "state": {}}
    for name, value in _named(extras).items():
        path, expected = form.beside.get(name, (("state", name.removeprefix("state.")), None))
        if path[0] != "state":
            filled[path[0]] = copy.deepcopy(value)
        elif name in form.beside or _is_for_any(name, [form]):
            filled["state"][path[1]] = _fitted(name, value, expected, form, without_memory=without_memory)
    return filled


def _named(extras: Mapping[str, Any]) -> dict[str, Any]:
    beside = {name: value for name, value in extras.items() if name != "state"}
    return beside | {f"state.{name}": value for name, value in extras.get("state", {}).items()}


def _is_state(name: str) -> bool:
    return name.startswith("state.")


def _is_for_any(name: str, forms: Sequence[OptimizerForm]) -> bool:
    """Whether an optimizer may make it, as far as is known: its first step couldn't be tried."""
    return _is_state(name) and len(forms) == 1 and forms[0].predicted is None


def _fitted(name: str, saved: Any, expected: Any, form: OptimizerForm, *, without_memory: bool) -> Any:
    """A copy of a value in the form that the optimizer has it in, on its device."""
    known = {} if expected is None else flat_entries(expected if isinstance(expected, Mapping) else {"": expected})
    device = next((p.device for group in form.optimizer.param_groups for p in group["params"]), torch.device("cpu"))

    def fit(leaf: str, value: Any) -> Any:
        live = known.get(leaf)
        if not isinstance(value, torch.Tensor):
            return value
        if isinstance(live, torch.Tensor):
            if (live.shape, live.dtype) != (value.shape, value.dtype):
                raise InstallError(
                    f"{name}: was saved as {value.dtype} of the shape {tuple(value.shape)}, and "
                    f"{type(form.optimizer).__name__} has {live.dtype} of the shape {tuple(live.shape)}; nothing was changed"
                )
            value = value.to(device if live.is_meta else live.device)
        return twin(value) if without_memory else value

    return map_leaves(with_keys_of(expected, copy.deepcopy(saved)), fit)
