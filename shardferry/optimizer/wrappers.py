"""Undo what wrappers do: prefixes in parameters' names, and objects that stand in for torch's own optimizers.

To support one more wrapper of modules, add its prefix to `_PREFIXES`, unless a model may use it as a name of its own:
then find the wrapper by its class, as `FqnCleaner.for_model` does for DDP. To support one more wrapper of optimizers,
let `torch_optimizers` find the optimizers inside.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

# Wrappers put these into the names of parameters; the FQNs of checkpoints are without them.
_PREFIXES = (
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
    "_orig_mod.",
    "_forward_module.",  # Lightning Fabric's module has both, mostly the same one
    "_original_module.",
)
_DDP = "module."  # also a name that a model may have chosen itself


@dataclass(frozen=True, slots=True)
class FqnCleaner:
    """Turns the names of one model's parameters, buffers and modules into FQNs: without what wrappers added."""

    ddp_prefixes: tuple[str, ...]  # from the root up to and with each DDP wrapper's ``module.``, longest first

    @classmethod
    def for_model(cls, root: Module) -> FqnCleaner:
        """For the names that ``root.named_modules()`` and its like give."""
        wrapped = [name for name, module in root.named_modules() if isinstance(module, DistributedDataParallel)]
        prefixes = (f"{name}.{_DDP}" if name else _DDP for name in wrapped)
        return cls(tuple(sorted(prefixes, key=len, reverse=True)))

    def clean(self, name: str) -> str:
        """The FQN."""
        for prefix in self.ddp_prefixes:
            if name.startswith(prefix):
                name = name[: len(prefix) - len(_DDP)] + name[len(prefix) :]
        for prefix in _PREFIXES:
            name = name.replace(prefix, "")
        return name


def torch_optimizers(optimizer: Optimizer) -> tuple[Optimizer, ...]:
    """The optimizers whose state a load replaces, in order; usually the given one alone.

    Accelerate and Lightning hand out a wrapper that shows the state of its ``optimizer``. torchtitan hands out a container
    whose ``optimizers`` train its parameters; nobody reads the container's own state. An optimizer around another one that
    has state of its own, such as Lookahead's slow weights, is neither.
    """
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(inner, Optimizer) and inner.state is optimizer.state:
        return torch_optimizers(inner)
    members = getattr(optimizer, "optimizers", None)
    if isinstance(members, list | tuple) and all(isinstance(member, Optimizer) for member in members):
        found = tuple(one for member in members for one in torch_optimizers(member))
        if _trained(found) == _trained([optimizer]) and not optimizer.state:
            return found
    return (optimizer,)


def _trained(optimizers: Iterable[Optimizer]) -> set[int]:
    return {id(parameter) for one in optimizers for group in one.param_groups for parameter in group["params"]}
