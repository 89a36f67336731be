"""The form of an optimizer's ``state_dict()``: what it has of each parameter now, and what it will have after a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.optim import Optimizer

from shardferry.errors import InstallError
from shardferry.optimizer.shadow import NoShadow, Predicted, predict, shared_state


@dataclass(frozen=True)
class OptimizerForm:
    """A live optimizer's state dict, with the parameter that each entry belongs to."""

    optimizer: Optimizer
    state_dict: Mapping[str, Any]
    keys: Sequence[Sequence[Any]]  # in state_dict["state"], by param group and parameter
    predicted: Predicted | None  # None: the optimizer can't be stepped without memory
    why_not: str = ""

    @classmethod
    def of(cls, optimizer: Optimizer) -> OptimizerForm:
        """Ask an optimizer.

        Raises:
            InstallError: its ``state_dict()`` doesn't list the parameters of its param groups.
        """
        state_dict = optimizer.state_dict()
        if not {"state", "param_groups"} <= set(state_dict):
            raise InstallError(
                f"{type(optimizer).__name__}.state_dict() has {sorted(map(str, state_dict))}, not 'state' and 'param_groups'; an "
                "optimizer whose state dict has another form can't be filled"
            )
        keys = [group["params"] for group in state_dict["param_groups"]]
        sizes, live = [len(there) for there in keys], [len(group["params"]) for group in optimizer.param_groups]
        if sizes != live:
            raise InstallError(
                f"{type(optimizer).__name__}.state_dict() lists {sizes} parameters by group, its param_groups have {live}; "
                "an optimizer whose state dict has another form can't be filled"
            )
        try:
            return cls(optimizer, state_dict, keys, predict(optimizer))
        except NoShadow as error:
            return cls(optimizer, state_dict, keys, None, str(error))

    @cached_property
    def beside(self) -> dict[str, tuple[tuple[Any, ...], Any]]:
        """What the state dict has, or will have after a step, that is of no parameter: name -> path and value.

        ``total`` stands beside ``state``, ``state.k`` in it.
        """
        shared = {**(self.predicted.shared if self.predicted else {}), **shared_state(self.state_dict)}
        found = {f"state.{key}": (("state", key), value) for key, value in shared.items()}
        rest = {name: value for name, value in self.state_dict.items() if name not in ("state", "param_groups")}
        return found | {name: ((name,), value) for name, value in rest.items()}

    def entries(self) -> Iterator[tuple[torch.Tensor, Mapping[Any, Any], Mapping[Any, Any]]]:
        """Every trained tensor, its entries now, and its entries after a step; both in the state dict's form."""
        for index, (group, keys) in enumerate(zip(self.optimizer.param_groups, self.keys, strict=True)):
            for position, (parameter, key) in enumerate(zip(group["params"], keys, strict=True)):
                later = {} if self.predicted is None else self.predicted.entries[index][position]
                yield parameter, self.state_dict["state"].get(key) or {}, later
