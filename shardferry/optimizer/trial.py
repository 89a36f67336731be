"""Before a load: compare the saved entries with those that the optimizer makes, and try the load on a shadow of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from shardferry.checkpoint.optimizer_state import SCALAR_STATE
from shardferry.config import KeyPolicy
from shardferry.errors import InstallError
from shardferry.optimizer.shadow import (
    NoShadow,
    Predicted,
    Shadow,
    has_load_hooks,
    one_of_each,
    plain_hyperparameters,
    predict,
)

_MANY_STEPS = 12  # entries that an optimizer makes late, as Lookahead's slow weights, are there after so many


@dataclass(frozen=True, slots=True)
class SavedParam:
    """A live parameter that a load is for, and the names of its saved state entries."""

    tensor: torch.Tensor  # as the optimizer knows it
    fqn: str  # the first one of a flat parameter
    group: int  # in its optimizer
    position: int  # in its group
    saved: AbstractSet[str]  # top-level names; of values that are not None
    live: AbstractSet[str]  # of the entries that the optimizer has now: its constructor may have made them


@dataclass
class Entries:
    """State entries that only one side has, and that the request tolerates."""

    missing: list[tuple[SavedParam, str]] = field(default_factory=list)  # the optimizer makes them, they were not saved
    unexpected: list[tuple[SavedParam, str]] = field(default_factory=list)  # saved, and the optimizer makes none
    unknown: str = ""  # why the optimizer's entries are not known

    def dropped(self, tensor: torch.Tensor) -> set[str]:
        """The names that a parameter does not get."""
        return {name for param, name in self.unexpected if param.tensor is tensor}

    def kept(self, tensor: torch.Tensor) -> set[str]:
        """The names that a parameter keeps from its live state."""
        return {name for param, name in self.missing if param.tensor is tensor}


def compare_entries(
    optimizer: Optimizer,
    params: Sequence[SavedParam],
    hyperparameters: Sequence[Mapping[str, Any]],
    policy: KeyPolicy,
    known: Predicted | None,
) -> Entries:
    """Compare the saved state entries with those that the optimizer makes under its new hyperparameters.

    Args:
        params: those that the load is for.
        hyperparameters: by param group.
        known: what it makes, where the new hyperparameters don't change that; None: it is predicted.

    Raises:
        InstallError: the state is another optimizer's, or one side has entries of its own and the request doesn't allow it.
    """
    try:
        later = known or predict(optimizer, hyperparameters)
    except NoShadow as error:
        return Entries(unknown=str(error))
    found = Entries()
    for param, made in _with_made(params, later):
        found.missing += [(param, name) for name in sorted(made - param.saved)]
        found.unexpected += [(param, name) for name in sorted(param.saved - made - param.live)]
    if found.unexpected:
        found.unexpected = _without_late(optimizer, params, hyperparameters, found.unexpected)
    _refuse_another_optimizer(optimizer, found, later)
    if later.has_guessed:
        return Entries()
    if found.missing and not policy.allow_missing:
        raise InstallError(_only_one_side(optimizer, found.missing, later, "was not saved", "allow_missing"))
    if found.unexpected and not policy.ignore_unexpected:
        raise InstallError(_only_one_side(optimizer, found.unexpected, later, "was saved", "ignore_unexpected"))
    return found


def _with_made(params: Sequence[SavedParam], later: Predicted) -> Iterator[tuple[SavedParam, set[str]]]:
    """Parameters that have saved state, each with the names that the optimizer makes. One that never stepped has none."""
    for param in params:
        if param.saved and param.tensor.requires_grad:
            yield param, _names(later.entries[param.group][param.position])


def _names(entries: Mapping[Any, Any]) -> set[str]:
    return {str(name) for name, value in entries.items() if value is not None}


def _without_late(
    optimizer: Optimizer,
    params: Sequence[SavedParam],
    hyperparameters: Sequence[Mapping[str, Any]],
    unexpected: Sequence[tuple[SavedParam, str]],
) -> list[tuple[SavedParam, str]]:
    """Without those that the optimizer makes after more steps."""
    try:
        late = predict(optimizer, hyperparameters, num_steps=_MANY_STEPS)
    except NoShadow:
        return list(unexpected)
    made = {id(param.tensor): names for param, names in _with_made(params, late)}
    return [(param, name) for param, name in unexpected if name not in made[id(param.tensor)]]


def _refuse_another_optimizer(optimizer: Optimizer, found: Entries, later: Predicted) -> None:
    """Where nothing but the step is the same."""
    for param, _ in found.unexpected:
        made = _names(later.entries[param.group][param.position]) | param.live
        if not (made & param.saved) - SCALAR_STATE and (made or not later.has_guessed):
            raise InstallError(
                f"{param.fqn}: was saved by another optimizer: it has the state {sorted(param.saved)}, and "
                f"{type(optimizer).__name__} makes {sorted(made) or 'none'}. Load it into the optimizer that saved it; nothing was changed"
            )


def _only_one_side(
    optimizer: Optimizer, entries: Sequence[tuple[SavedParam, str]], later: Predicted, what: str, policy: str
) -> str:
    param, name = entries[0]
    made = _names(later.entries[param.group][param.position])
    return (
        f"{param.fqn}: {name!r} {what}, and {type(optimizer).__name__} makes {sorted(made)}; saved are "
        f"{sorted(param.saved)} ({len(entries)} entries of {len({id(p.tensor) for p, _ in entries})} parameters are only on one "
        f"side). Give the optimizer that was saved, or set keys: {policy}; nothing was changed"
    )


def try_load(optimizer: Optimizer, state_dict: dict[str, Any], *, steps: bool) -> None:
    """Try a load without memory.

    Args:
        state_dict: what the live optimizer is to load; its tensors have no memory.
        steps: whether to try the step after it too.

    Raises:
        InstallError: the optimizer refuses the state, or can't step with it.
    """
    if has_load_hooks(optimizer):  # they may change the state dict, and run once only
        return
    shadow = _loaded_shadow(optimizer, state_dict)
    if shadow is None or not steps:
        return
    try:
        shadow.narrow(one_of_each(optimizer, state_dict))  # of thousands of parameters a dozen differ
        shadow.step()
    except NoShadow:
        _try_whole_step(optimizer, state_dict)


def _loaded_shadow(optimizer: Optimizer, state_dict: dict[str, Any]) -> Shadow | None:
    """A copy that has loaded the state dict; None where that can't be tried. Raises InstallError."""
    groups = [{**group, **plain_hyperparameters(group)} for group in state_dict["param_groups"]]
    try:
        shadow = Shadow(optimizer)
        shadow.load({**state_dict, "param_groups": groups})
    except NoShadow:
        return None
    except Exception as error:
        raise InstallError(
            f"{type(optimizer).__name__}.load_state_dict refuses the saved state: {type(error).__name__}: {error}. The "
            "checkpoint is another optimizer's, or of another version of it; nothing was changed"
        ) from error
    return shadow


def _try_whole_step(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Step with all parameters. Raises InstallError."""
    shadow = _loaded_shadow(optimizer, state_dict)
    try:
        if shadow is not None:
            shadow.step()
    except NoShadow as answer:
        cause = answer.__cause__
        if cause is not None and isinstance(cause, KeyError | AttributeError | IndexError | TypeError):
            raise InstallError(
                f"{type(optimizer).__name__} couldn't step with the saved state: {type(cause).__name__}: {cause}. The "
                "checkpoint is another optimizer's, or of another version of it; nothing was changed"
            ) from cause
