"""The optimizers of other libraries: each class, with its default arguments where these are enough."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from tests.optimizers.table import Case

LIBRARIES = {
    "pytorch-optimizer": "pytorch_optimizer",
    "torch-optimizer": "torch_optimizer",
    "schedulefree": "schedulefree",
    "bitsandbytes": "bitsandbytes.optim",
    "adam-mini": "adam_mini",
    "torchao": "torchao.optim",
}

Maker = Callable[[type, nn.Module, float], Any]


def _plain(cls: type, model: nn.Module, lr: float, **arguments: Any) -> Any:
    has_lr = "lr" in inspect.signature(cls).parameters
    return cls(list(model.parameters()), **({"lr": lr} if has_lr else {}), **arguments)


def _around_adamw(cls: type, model: nn.Module, lr: float) -> Any:
    return cls(torch.optim.AdamW(model.parameters(), lr=lr))


def _matrices_apart(cls: type, model: nn.Module, lr: float) -> Any:
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim == 2], "use_muon": True},
        {"params": [p for p in parameters if p.ndim != 2], "use_muon": False},
    ]
    return cls(groups, lr=lr)


def _named(cls: type, model: nn.Module, lr: float) -> Any:
    return cls(list(model.named_parameters()), lr=lr, dim=64, n_heads=4)


def _compiled(cls: type, model: nn.Module, lr: float) -> Any:
    torch.compiler.reset()  # torch compiles a function for so many optimizers only
    # torchao's compiled step fails on shards of several sizes (torch 2.13: "incorrect fake kernel"), on one rank before the others.
    torch.compiler.set_stance("force_eager" if isinstance(model, FSDPModule) else "default")
    return _plain(cls, model, lr)


def _of_model(cls: type, model: nn.Module, lr: float) -> Any:
    return cls(model, lr=lr)


def _with(**arguments: Any) -> Maker:
    return lambda cls, model, lr: _plain(cls, model, lr, **arguments)


def _with_base(cls: type, model: nn.Module, lr: float) -> Any:
    return cls(list(model.parameters()), base_optimizer=torch.optim.AdamW, lr=lr)


_MUONS = ("AdaGO", "AdaMuon", "DistributedMuon", "Muon", "MuonClip", "NorMuon")
_MAKERS: dict[tuple[str, str], Maker] = {
    **{("pytorch-optimizer", name): _matrices_apart for name in _MUONS},
    **{
        ("pytorch-optimizer", name): _around_adamw for name in ("Lookahead", "OrthoGrad", "ScheduleFreeWrapper", "TRAC")
    },
    **{("pytorch-optimizer", name): _with_base for name in ("FriendlySAM", "LookSAM", "SAM")},
    ("pytorch-optimizer", "AdamMini"): _of_model,
    ("pytorch-optimizer", "BSAM"): _with(num_data=1),
    ("pytorch-optimizer", "Ranger21"): _with(num_iterations=100),
    ("torch-optimizer", "Lookahead"): _around_adamw,
    ("schedulefree", "ScheduleFreeWrapper"): _around_adamw,
    ("schedulefree", "ScheduleFreeWrapperReference"): _around_adamw,
    **{
        ("bitsandbytes", f"{name}{bits}"): _with(momentum=0.875)
        for name in ("SGD", "LARS")
        for bits in ("", "8bit", "32bit")
    },
    ("adam-mini", "Adam_mini"): _named,
}
# Both quantise the state of parameters of 4,096 elements and more; torchao looks at this rank's part of them.
_WIDTHS = {"bitsandbytes": 64, "torchao": 256}
_WITH_CLOSURE = {"AliG", "BSAM", "FriendlySAM", "LookSAM", "SAM"}


def classes(library: str) -> dict[str, type]:
    """A library's optimizers, and its wrappers of optimizers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = vars(importlib.import_module(LIBRARIES[library])).values()
    optimizers = {
        c.__name__: c
        for c in found
        if inspect.isclass(c) and c is not Optimizer and (issubclass(c, Optimizer) or hasattr(c, "param_groups"))
    }
    return dict(sorted(optimizers.items()))


def cases(library: str) -> list[Case]:
    """One for each class."""

    def case(name: str, cls: type) -> Case:
        make = _MAKERS.get((library, name), _compiled if library == "torchao" else _plain)
        width = _WIDTHS.get(library, 8)
        closure = name in _WITH_CLOSURE or name.endswith("Closure")
        return Case(name, lambda model, lr: make(cls, model, lr), width=width, closure=closure)

    return [case(name, cls) for name, cls in classes(library).items()]
