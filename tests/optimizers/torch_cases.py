"""Every class of torch.optim."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from tests.optimizers.table import Case


def _groups(model: nn.Module, lr: float) -> list[dict[str, Any]]:
    """Matrices, and biases with a learning rate of their own."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim == 2], "lr": lr},
        {"params": [p for p in parameters if p.ndim != 2], "lr": 2 * lr},
    ]


def _case(cls: type[Optimizer], label: str = "", *, sparse: bool = False, **arguments: Any) -> Case:
    name = f"{cls.__name__} {label}".strip()
    return Case(name, lambda model, lr: cls(_groups(model, lr), **arguments), sparse=sparse)  # type: ignore[call-arg]


def _muon(model: nn.Module, lr: float) -> Optimizer:
    return torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=lr)


def _lbfgs(model: nn.Module, lr: float) -> Optimizer:
    return torch.optim.LBFGS(model.parameters(), lr=lr, max_iter=2)


_OTHER: dict[str, Callable[[nn.Module, float], Optimizer]] = {"Muon": _muon, "LBFGS": _lbfgs}

CLASSES = [
    c for c in vars(torch.optim).values() if isinstance(c, type) and issubclass(c, Optimizer) and c is not Optimizer
]

_CASES = [
    *(
        Case(c.__name__, _OTHER[c.__name__], closure=c is torch.optim.LBFGS)
        if c.__name__ in _OTHER
        else _case(c, sparse=c is torch.optim.SparseAdam)
        for c in CLASSES
    ),
    _case(torch.optim.AdamW, "amsgrad", amsgrad=True),
    _case(torch.optim.AdamW, "fused", fused=True),
    _case(torch.optim.AdamW, "foreach", foreach=True),
    _case(torch.optim.SGD, "momentum", momentum=0.875, nesterov=True),
    _case(torch.optim.RMSprop, "centered", momentum=0.5, centered=True),
]


def cases() -> list[Case]:
    """All classes, and some of them with other arguments."""
    return _CASES
