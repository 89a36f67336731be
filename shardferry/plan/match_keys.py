"""Match the wanted keys with the saved ones: missing, unexpected and mismatched keys."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from shardferry.checkpoint.optimizer_state import SavedOptimizer, StateEntry
from shardferry.config import LoadRequest, Selection
from shardferry.errors import LayoutError, PlanError
from shardferry.layout.rank_layout import RankLayout
from shardferry.layout.spec import SpecLayout

_SHOWN = 5  # names in a message


@dataclass(frozen=True, slots=True)
class MatchedParam:
    """A wanted parameter that is saved."""

    fqn: str  # as wanted
    saved: str  # its name in the checkpoint, after renaming: another one of a tied parameter's, say


@dataclass(frozen=True, slots=True)
class Overwritten:
    """A hyperparameter that a load has changed."""

    group: int  # of the live optimizers' param groups, counted through
    name: str
    old: Any  # None where the group had none of this name
    new: Any


@dataclass(frozen=True, slots=True)
class KeyReport:
    """Keys that were missing or unexpected, and that the key policy tolerated. Two with the same keys are equal.

    A load into live objects tells more: state entries that only one side has, as ``<fqn>.<name>``, the hyperparameters that
    it has changed, and warnings.
    """

    missing: tuple[str, ...]  # FQNs that this rank wants and the checkpoint hasn't
    unexpected: tuple[str, ...]  # FQNs that the checkpoint has and no rank wants
    missing_entries: tuple[str, ...] = field(default=(), compare=False)  # the optimizer makes them, they were not saved
    unexpected_entries: tuple[str, ...] = field(
        default=(), compare=False
    )  # saved, and the optimizer has no use for them
    overwritten: tuple[Overwritten, ...] = field(default=(), compare=False)
    warnings: tuple[str, ...] = field(default=(), compare=False)


def matched_keys(names: Iterable[str], found: Sequence[MatchedParam]) -> dict[str, bool]:
    """Which of the saved names a rank takes."""
    taken = {name for parameter in found for name in (parameter.saved, parameter.fqn)}
    return {name: name in taken for name in sorted(names)}


def unexpected_keys(
    matched: Mapping[str, bool], taken_by_any: Sequence[bool], request: LoadRequest, location: str
) -> tuple[str, ...]:
    """The saved names that no rank takes.

    Args:
        taken_by_any: for each name, whether some rank takes it.

    Raises:
        PlanError: there are some, and the request does not ignore them.
    """
    left = tuple(name for name, taken in zip(matched, taken_by_any, strict=True) if not taken)
    if left and not request.keys.ignore_unexpected:
        raise PlanError(
            f"{left[0]}: is saved in {location}, but no rank wants it ({len(left)} of {len(matched)} saved names are "
            f"unexpected: {shown(left)}); give the model that was saved, exclude them, or set keys: ignore_unexpected"
        )
    return left


def check_globs(selection: Selection, saved: Collection[str]) -> None:
    """Refuse a renaming or a selection that is about nothing that was saved: it is mistyped, or of another checkpoint.

    ``exclude`` may be about what only the live model has.

    Args:
        saved: all names before renaming.

    Raises:
        PlanError: the message has the nearest names.
    """
    for renaming in selection.rename:
        if not any(renaming.apply(name) is not None for name in saved):
            raise _fits_nothing("rename", renaming.saved, saved)
    if not (selection.include or selection.exclude):
        return
    here = {name for names in selection.wanted_names(saved).values() for name in names}
    for glob in selection.include:
        if not any(fnmatchcase(name, glob) for name in here):
            raise _fits_nothing("include", glob, here)
    if not any(map(selection.selects, here)):
        raise PlanError(
            f"include {list(selection.include)} and exclude {list(selection.exclude)} leave none of the {len(here)} saved "
            "names; nothing would be loaded"
        )


def check_spec(spec: SpecLayout, names: Collection[str], state: Mapping[str, Mapping[str, StateEntry]] | None) -> None:
    """Refuse a rule or a ``held_by`` of a spec that is about nothing that was saved, as `check_globs` does.

    Args:
        names: all names after renaming, also of parameters that are not selected.
        state: all state entries by FQN and name, after renaming; None where no optimizer is wanted: rules with ``state``
            may then be about one.

    Raises:
        PlanError: the message has the nearest names.
    """
    globs = [("rule", rule.match) for rule in spec.rules] + [("held_by", held.match) for held in spec.held_by]
    for word, glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            raise _fits_nothing(word, glob, names)
    if state is None:
        return
    for rule in spec.rules:
        if rule.state:
            entries = {name for fqn, there in state.items() if fnmatchcase(fqn, rule.match) for name in there}
            if entries and not any(fnmatchcase(name, rule.state) for name in entries):
                raise _fits_nothing(f"rule {rule.match!r}: state", rule.state, entries, "state entries there")


def _fits_nothing(word: str, glob: str, names: Collection[str], what: str = "saved names") -> PlanError:
    return PlanError(
        f"{word}: {glob!r} fits none of the {len(names)} {what}; the nearest are {nearest(glob, names)}. "
        "Correct it, or leave it out"
    )


def find_state(
    saved: SavedOptimizer,
    layout: RankLayout,
    request: LoadRequest,
    saved_shape: Callable[[str], tuple[int, ...] | None],
) -> tuple[list[MatchedParam], tuple[str, ...]]:
    """The wanted parameters of the optimizer that are saved, and those that aren't.

    Args:
        saved_shape: a saved parameter's shape by its name, as far as its state tells.

    Raises:
        PlanError: some are missing, and the request does not allow it.
    """
    if request.optimizer_key is None:
        return [], ()
    wanted = layout.fqns()
    if wanted is None:
        known = dict.fromkeys([*saved.state, *sorted(saved.grouped)])
        return [MatchedParam(fqn, fqn) for fqn in known if layout.holds(fqn)], ()
    known_names = saved.state.keys() | saved.grouped
    names: dict[str, str | None] = {}
    for fqn in filter(request.selection.selects, wanted):
        with_state = [name for name in (fqn, *layout.aliases(fqn)) if name in saved.state]
        if len(with_state) > 1 and not request.keys.ignore_unexpected:
            raise PlanError(
                f"{with_state[0]} and {with_state[1]} are one (tied) parameter here, and the checkpoint has state of its own for "
                "each; give the model untied, as it was saved, or set keys: ignore_unexpected to take the state of the first"
            )
        names[fqn] = with_state[0] if with_state else _name_in(known_names, fqn, layout)
    missing = [fqn for fqn, name in names.items() if name is None and not layout.may_lack(fqn)]
    if missing and not request.keys.allow_missing:
        tied_to = _tied_to(missing[0], [name for name in names.values() if name], layout, saved_shape)
        raise PlanError(_missing_state(missing, saved, len(wanted)) + tied_to)
    return [MatchedParam(fqn, name) for fqn, name in names.items() if name is not None], tuple(missing)


def _missing_state(missing: list[str], saved: SavedOptimizer, num_wanted: int) -> str:
    first = missing[0]
    return (
        f"{first}: the checkpoint has no state for this parameter under {saved.optimizer_key!r} "
        f"({len(missing)} of {num_wanted} wanted parameters are missing: {shown(missing)}; {len(saved.state)} are saved); "
        f"the nearest saved names are {nearest(first, saved.state)}. Rename them (a list of names gives one saved parameter, which was tied, to several), or set keys: allow_missing"
    )


def _tied_to(
    missing: str, found: Sequence[str], layout: RankLayout, saved_shape: Callable[[str], tuple[int, ...] | None]
) -> str:
    """What to do if a parameter was saved as one with another: the only saved one that has its shape."""
    shape = layout.parameter_shape(missing)
    alike = [name for name in found if saved_shape(name) == shape]
    if len(alike) != 1:
        return ""
    return (
        f". If it was tied to {alike[0]}, whose shape is {shape} too: rename: {{{alike[0]}: [{alike[0]}, {missing}]}}"
    )


def find_weights(
    saved: Collection[str], layout: RankLayout, request: LoadRequest, location: str
) -> tuple[list[MatchedParam], tuple[str, ...]]:
    """The wanted parameters and buffers that are saved, and those that aren't. Raises PlanError as `find_state` does."""
    wanted = layout.weights()
    if wanted is None:
        return [MatchedParam(fqn, fqn) for fqn in saved if layout.holds(fqn)], ()
    names = {fqn: _name_in(saved, fqn, layout) for fqn in filter(request.selection.selects, wanted)}
    missing = [fqn for fqn, name in names.items() if name is None]
    if missing and not request.keys.allow_missing:
        raise PlanError(
            f"{missing[0]}: {location} has no weights of this name under model_key {request.model_key!r} "
            f"({len(missing)} of {len(wanted)} wanted ones are missing: {shown(missing)}); the nearest saved names are "
            f"{nearest(missing[0], saved)}. Rename them, or set keys: allow_missing"
        )
    found = [MatchedParam(fqn, name) for fqn, name in names.items() if name is not None]
    # The other names of tied parameters too: `shardferry.optimizer.install` compares the weights.
    others = (name for fqn, first in names.items() for name in layout.aliases(fqn) if name in saved and name != first)
    return [*found, *(MatchedParam(name, name) for name in others)], tuple(missing)


def _name_in(saved: Collection[str], fqn: str, layout: RankLayout) -> str | None:
    """The name under which a (tied) parameter is saved."""
    return next((name for name in (fqn, *layout.aliases(fqn)) if name in saved), None)


def mismatch_error(mismatched: Sequence[Exception]) -> Exception:
    """One error for all parameters that don't fit: the first one's words, and how many more there are."""
    first = mismatched[0]
    if len(mismatched) == 1:
        return first
    names = list(dict.fromkeys(str(error).partition(":")[0] for error in mismatched))
    return LayoutError(f"{first} ({len(mismatched)} entries of {len(names)} parameters are mismatched: {shown(names)})")


def nearest(name: str, names: Collection[str]) -> str:
    """The names most like one, for people who mistyped."""
    return ", ".join(get_close_matches(name, names, n=3, cutoff=0.0)) or "none"


def shown(names: Sequence[str]) -> str:
    """Some of many names."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
