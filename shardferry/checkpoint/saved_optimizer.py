"""What a checkpoint has of one optimizer, under the names that are used here: renamed, selected, positions resolved."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from shardferry.checkpoint.optimizer_index import OptimizerIndex, StateEntry
from shardferry.checkpoint.param_groups import build_param_groups
from shardferry.config import LoadRequest
from shardferry.errors import PlanError
from shardferry.state_dicts import ParamGroup

_NAMES = "param_names"  # since torch 2.6 in the groups of optimizers that were made from named parameters
Positions = Sequence[Sequence[str]]  # FQNs of each live param group, in order


@dataclass(frozen=True)
class SavedOptimizer:
    """One saved optimizer."""

    optimizer_key: str
    state: Mapping[str, Mapping[str, StateEntry]]  # FQN -> state name -> entry
    param_groups: tuple[ParamGroup, ...] | None  # "params" lists FQNs; None: they were not read
    names: frozenset[str]  # of all its parameters, before renaming and selection

    @classmethod
    def of(
        cls, index: OptimizerIndex, values: Mapping[str, Any] | None, request: LoadRequest, positions: Positions | None
    ) -> SavedOptimizer:
        """Name everything as the request wants it.

        Args:
            values: the saved Python objects by key; None in a dry run.
            positions: of the live optimizer, for state that was saved by position.

        Raises:
            PlanError: two saved parameters get one name, or the saved positions are not those of the live optimizer.
        """
        groups = None
        if values is not None:
            groups = build_param_groups({path: values[key] for path, key in index.param_groups.items()})
        names = _positional_names(index, groups, positions) if _is_positional(index, groups) else {}
        naming = _Naming(names, request)
        state: dict[str, Mapping[str, StateEntry]] = {}
        for saved_fqn, entries in index.state.items():
            fqn = naming.fqn(saved_fqn)
            if fqn in state:
                raise PlanError(f"{fqn}: two saved parameters get this name, {saved_fqn!r} is one; narrow the renaming")
            if request.selection.selects(fqn):
                state[fqn] = entries
        named = None if groups is None else tuple(naming.group(group) for group in groups)
        return cls(index.optimizer_key, state, named, naming.before(index, groups))

    def groups_of(self, fqns: Collection[str]) -> tuple[ParamGroup, ...] | None:
        """The param groups with these parameters alone; all groups stay, those of other ranks' parameters without any."""
        if self.param_groups is None:
            return None
        return tuple(
            {**group, "params": [fqn for fqn in group.get("params", ()) if fqn in fqns]} for group in self.param_groups
        )

    @cached_property
    def grouped(self) -> frozenset[str]:
        """FQNs in the param groups."""
        return frozenset(fqn for group in self.param_groups or () for fqn in group.get("params", ()))


@dataclass(frozen=True)
class _Naming:
    positions: Mapping[str, str]  # a saved position, in digits: its FQN
    request: LoadRequest

    def fqn(self, saved: str | int) -> str:
        return self.request.selection.wanted_name(self._saved_fqn(saved))

    def before(self, index: OptimizerIndex, groups: Sequence[ParamGroup] | None) -> frozenset[str]:
        """All saved FQNs before renaming."""
        grouped = (saved for group in groups or () for saved in group.get("params", ()))
        return frozenset(map(self._saved_fqn, (*index.state, *grouped)))

    def _saved_fqn(self, saved: str | int) -> str:
        return self.positions.get(str(saved), str(saved))

    def group(self, group: ParamGroup) -> ParamGroup:
        fqns = [self.fqn(saved) for saved in group.get("params", ())]
        rest = {name: value for name, value in group.items() if name not in ("params", _NAMES)}
        return {**rest, "params": [fqn for fqn in fqns if self.request.selection.selects(fqn)]}


def _is_positional(index: OptimizerIndex, groups: Sequence[ParamGroup] | None) -> bool:
    """Whether a plain ``optimizer.state_dict()`` was saved: its parameters are numbers."""
    listed = [saved for group in groups or () for saved in group.get("params", ())]
    names = listed or list(index.state)
    return bool(names) and all(isinstance(name, int) or name.isdigit() for name in names)


def _positional_names(
    index: OptimizerIndex, groups: Sequence[ParamGroup] | None, positions: Positions | None
) -> dict[str, str]:
    """FQNs of the saved positions: as the groups name them, else as the live optimizer has them."""
    if groups and all(len(group.get(_NAMES) or ()) == len(group["params"]) for group in groups):
        return {str(saved): fqn for group in groups for saved, fqn in zip(group["params"], group[_NAMES], strict=True)}
    if positions is None or groups is None:
        return {}  # a target without a live optimizer keeps the numbers as names
    saved_sizes, live_sizes = [len(group["params"]) for group in groups], [len(group) for group in positions]
    if saved_sizes != live_sizes:
        raise PlanError(
            f"{index.optimizer_key!r} was saved by position (a plain optimizer.state_dict()): its param groups have {saved_sizes} "
            f"parameters, those of the live optimizer {live_sizes}; make the optimizer as it was when it was saved, or save "
            "with torch.distributed.checkpoint.state_dict.get_optimizer_state_dict, which uses names"
        )
    return {
        str(saved): fqn
        for group, fqns in zip(groups, positions, strict=True)
        for saved, fqn in zip(group["params"], fqns, strict=True)
    }
