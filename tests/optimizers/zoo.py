"""The optimizers of other libraries."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from tests.optimizers.table import Case

LIBRARIES = {
    "pytorch-optimizer": "pytorch_optimizer",
    "torch-optimizer": "torch_optimizer",
    "schedulefree": "schedulefree",
    "bitsandbytes": "bitsandbytes.optim",
    "torchao": "torchao.optim",
    "adam-mini": "adam_mini",
}


def _plain(cls: type) -> Callable[[nn.Module, float], Any]:
    def make(model: nn.Module, lr: float) -> Any:
        has_lr = "lr" in inspect.signature(cls).parameters
        return cls(list(model.parameters()), **({"lr": lr} if has_lr else {}))

    return make


def classes(module: str) -> dict[str, type]:
    found = vars(importlib.import_module(module)).values()
    return {
        c.__name__: c
        for c in found
        if inspect.isclass(c) and c is not Optimizer and (issubclass(c, Optimizer) or hasattr(c, "param_groups"))
    }


def cases(library: str) -> list[Case]:
    module = LIBRARIES[library]
    return [Case(f"{library} {name}", _plain(cls), wide="bit" in name or "Fp8" in name) for name, cls in sorted(classes(module).items())]
