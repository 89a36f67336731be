"""Undo what wrappers do: prefixes in parameters' names, and objects that stand in for torch's own optimizers.

To support one more wrapper of modules, add its prefix in `shardferry.config.clean_fqn`, unless a model may use it as a name of its own:
then find the wrapper by its class, as `FqnCleaner.for_model` does for DDP. To support one more wrapper of optimizers,
let `torch_optimizers` find the optimizers inside.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from shardferry.config import clean_fqn
from shardferry.errors import InstallError

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
        return clean_fqn(name)


def torch_optimizers(optimizer: Optimizer) -> tuple[Optimizer, ...]:
    """The optimizers whose state a load replaces, in order; usually the given one alone.

    Accelerate and Lightning hand out a wrapper that shows the state of an optimizer in it. torchtitan hands out a container
    whose ``optimizers`` train its parameters; nobody reads the container's own state.

    Raises:
        InstallError: it is no optimizer, or one around another that has state of its own, such as Lookahead or
            ZeroRedundancyOptimizer: what torch's checkpoints hold of it is the outer state alone.
    """
    if not isinstance(optimizer, Optimizer):
        raise InstallError(
            f"optimizer: {type(optimizer).__module__}.{type(optimizer).__name__} is not a torch.optim.Optimizer; give the "
            "optimizer in it, a list of optimizers, or a dict of them by optimizer_key"
        )
    members = getattr(optimizer, "optimizers", None)
    if isinstance(members, list | tuple) and members and all(isinstance(member, Optimizer) for member in members):
        found = tuple(one for member in members for one in torch_optimizers(member))
        if _trained(found) == _trained([optimizer]) and not optimizer.state:
            return found
    owned = list(_owned(optimizer))
    for _, inner in owned:
        if inner.state is optimizer.state:
            return torch_optimizers(inner)
    if owned:
        name, inner = owned[0]
        raise InstallError(
            f"{type(optimizer).__name__} owns another optimizer with state of its own, {name} ({type(inner).__name__}); "
            "torch's checkpoints hold the state of the outer one alone, and loading it would leave the inner one as it is. "
            f"Load each by itself: optimizer.{name} under the key that it was saved under"
        )
    return (optimizer,)


def _owned(optimizer: Optimizer) -> Iterator[tuple[str, Optimizer]]:
    """Optimizers among an optimizer's attributes, or in a list, tuple or dict there; by the attribute's name."""
    for name, value in vars(optimizer).items():
        many: Iterable[Any] = [value]
        if isinstance(value, list | tuple):
            many = value
        elif isinstance(value, dict) and name != "state":
            many = value.values()
        yield from ((name, one) for one in many if isinstance(one, Optimizer) and one is not optimizer)


def _trained(optimizers: Iterable[Optimizer]) -> set[int]:
    return {id(parameter) for one in optimizers for group in one.param_groups for parameter in group["params"]}
