"""Modules whose own code takes part in their state dict: hooks that rename, scale or split weights on saving and on loading.

torch's own modules and wrappers have such hooks too. These undo the wrapper's names and places, as the rest of this room
does, and don't count.

torch.nn.Module's private attributes are named in this file alone; tests/core/test_private_apis.py fails when torch changes
them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn import Module

from shardferry.optimizer.wrappers import FqnCleaner

_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
_METHODS = ("state_dict", "_save_to_state_dict", "load_state_dict", "_load_from_state_dict")


@dataclass(frozen=True)
class ModuleForm:
    """The state dict of a model part with code of its own."""

    root: Module
    keys: Mapping[str, str]  # of the state dict, by FQN
    tensors: Mapping[str, torch.Tensor]  # by FQN
    replaced: frozenset[str]  # FQNs of the parameters and buffers themselves, and of extra states

    @classmethod
    def of(cls, root: Module) -> ModuleForm | None:
        """Of a model part; None where no code but torch's takes part."""
        if not any(_has_own_code(module) for module in root.modules()):
            return None
        if any(isinstance(module, FullyShardedDataParallel) for module in root.modules()):
            return None  # its state dicts are collectives; see `refuse_flattened`
        fqns, state_dict = FqnCleaner.for_model(root), root.state_dict()
        keys = {fqns.clean(key): key for key in state_dict}
        named = (*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False))
        extras = {f"{path}._extra_state" if path else "_extra_state" for path, _ in root.named_modules()}
        return cls(
            root,
            keys,
            {fqn: state_dict[key] for fqn, key in keys.items() if isinstance(state_dict[key], torch.Tensor)},
            frozenset(fqns.clean(name) for name in (*(name for name, _ in named), *extras)),
        )


def has_own_code_in_fsdp1(root: Module) -> bool:
    """Whether a model that FSDP1 has flattened has code of its own, which can't be run rank by rank."""
    modules = list(root.modules())
    return any(isinstance(module, FullyShardedDataParallel) for module in modules) and any(map(_has_own_code, modules))


def _has_own_code(module: Module) -> bool:
    return any(not _is_of_torch(function) for function in _code_of(module))


def _code_of(module: Module) -> Iterator[Any]:
    for name in _HOOKS:
        for hook in getattr(module, name, {}).values():
            yield getattr(hook, "hook", hook)  # torch wraps those that want the module
    for name in _METHODS:
        yield getattr(type(module), name)


def _is_of_torch(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__module__", "")).partition(".")[0] == "torch"
