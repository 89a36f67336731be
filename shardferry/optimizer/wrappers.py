"""Find torch's own optimizers behind the objects that training programs hand out in their place."""

from __future__ import annotations

from collections.abc import Iterable

from torch.optim import Optimizer


def torch_optimizers(optimizer: Optimizer) -> tuple[Optimizer, ...]:
    """The optimizers whose state is to be replaced, in order; mostly the one that was given.

    Accelerate and Lightning hand out a wrapper that shows the state of its ``optimizer``; torchtitan a container whose
    ``optimizers`` train its parameters, and whose own state nobody reads. An optimizer around another that has state of
    its own (Lookahead's slow weights, say) is neither.
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
