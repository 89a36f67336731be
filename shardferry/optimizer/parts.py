"""Which modules belong to which optimizer, where optimizers have keys of their own in the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.nn import Module
from torch.optim import Optimizer

from shardferry.optimizer.live import LiveModel, as_tuple

Models = Module | Sequence[Module] | Mapping[str, Module]
Optimizers = Optimizer | Sequence[Optimizer] | Mapping[str, Optimizer]


@dataclass(frozen=True)
class LivePart:
    """Live objects whose state was saved under one key."""

    key: Any  # the optimizer's, in the dict that was given; None: one part is all
    live: LiveModel
    with_weights: bool = True  # False: an earlier part has the weights of the same modules


def live_parts(model: Models, optimizer: Optimizers) -> list[LivePart]:
    """One part for each optimizer of a dict; one for anything else."""
    models = tuple(model.values()) if isinstance(model, Mapping) else as_tuple(model)
    if not isinstance(optimizer, Mapping):
        return [LivePart(None, LiveModel.of(models, optimizer))]
    parts: list[LivePart] = []
    seen: set[int] = set()
    for key, one in optimizer.items():
        modules = (model[key],) if isinstance(model, Mapping) and key in model else _trained_by(one, models)
        ids = set(map(id, modules))
        parts.append(LivePart(key, LiveModel.of(modules, one), with_weights=not seen & ids))
        seen |= ids
    return parts


def _trained_by(optimizer: Optimizer, modules: Sequence[Module]) -> tuple[Module, ...]:
    """The modules of which an optimizer trains parameters; all where it trains none."""
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    found = tuple(module for module in modules if any(id(p) in trained for p in module.parameters()))
    return found or tuple(modules)
