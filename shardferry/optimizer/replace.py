"""Replace a live optimizer's state through its own `load_state_dict`, and put it back where that fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from shardferry.errors import InstallError, ShardferryError
from shardferry.optimizer.shadow import has_own_load
from shardferry.state_dicts import flat_entries, map_leaves


@dataclass
class Replacement:
    """One optimizer's new state dict, and what is needed to undo its load.

    Objects that others may refer to stay the same: the optimizer's param groups, its ``state``, and every state tensor whose
    shape, dtype and device the load leaves as they are. The tensors are filled by `finish`, as a copy can't be undone
    without a second one.
    """

    optimizer: Optimizer
    state_dict: Mapping[str, Any]
    _before: _Snapshot | None = field(default=None, init=False)

    def apply(self) -> None:
        """Call `load_state_dict`. Raises InstallError."""
        self._before = _Snapshot(self.optimizer)
        try:
            self.optimizer.load_state_dict(dict(self.state_dict))
        except ShardferryError:
            raise
        except Exception as error:
            raise InstallError(
                f"{type(self.optimizer).__name__}.load_state_dict raised {type(error).__name__}: {error}; the optimizer is as "
                "it was. The checkpoint is another optimizer's, or of another version of it"
            ) from error

    def undo(self) -> None:
        """Put everything back."""
        if self._before is not None:
            self._before.restore()

    def finish(self, apart: Set[int] = frozenset()) -> None:
        """Give back the identity of what was there, and the precision that torch's `load_state_dict` takes from state.

        Args:
            apart: ids of tensors that are not filled, see `shared_tensors`.
        """
        assert self._before is not None
        optimizer, before = self.optimizer, self._before
        given = _by_parameter(optimizer, self.state_dict)
        state: dict[Any, Any] = optimizer.state
        for parameter, entries in state.items():
            exact = given.get(id(parameter), {})
            there = before.leaves.get(parameter, {})

            def settle(name: str, value: Any, exact: Any = exact, there: Any = there) -> Any:
                return _in_place(there.get(name), _exact(exact.get(name), value), apart)

            state[parameter] = map_leaves(entries, settle)
        before.keep_identity(apart)

    def places(self) -> Iterator[tuple[Any, Any]]:
        """After `apply`: what stood in each place of state and param groups, and what stands there now."""
        assert self._before is not None
        for parameter, entries in self.optimizer.state.items():
            there = self._before.leaves.get(parameter, {})
            yield from ((there.get(name), value) for name, value in flat_entries(entries).items())
        for (_, old), new in zip(self._before.groups, self.optimizer.param_groups, strict=False):
            yield from ((old.get(name), value) for name, value in new.items())


def shared_tensors(replacements: Iterable[Replacement]) -> frozenset[int]:
    """The ids of tensors that stood in several places that have different values now: one rate of all groups, say.

    Such a tensor can't be filled; each place gets one of its own.
    """
    places: dict[int, list[Any]] = {}
    for old, new in chain.from_iterable(one.places() for one in replacements):
        if isinstance(old, torch.Tensor):
            places.setdefault(id(old), []).append(new)
    return frozenset(key for key, (first, *others) in places.items() if any(_differ(first, new) for new in others))


def _differ(one: Any, other: Any) -> bool:
    if not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)) or one.shape != other.shape:
        return True
    return one is not other and not _equal(one, other)


def _by_parameter(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """What was given to `load_state_dict`, by the id of the parameter and the dotted name of the entry."""
    return {
        id(parameter): flat_entries(state_dict["state"].get(key) or {})
        for group, packed in zip(optimizer.param_groups, state_dict["param_groups"], strict=True)
        for parameter, key in zip(group["params"], packed["params"], strict=True)
    }


def _exact(given: Any, taken: Any) -> Any:
    """An entry as it was given, where torch's `load_state_dict` has rounded it to its parameter's dtype, or has spoilt it.

    That method takes a string apart, as it does with all that can be iterated.
    """
    if isinstance(given, str) and isinstance(taken, str):
        return given if taken.startswith("<generator object") else taken
    if not (isinstance(given, torch.Tensor) and isinstance(taken, torch.Tensor)) or given is taken:
        return taken
    if given.dtype == taken.dtype or given.shape != taken.shape or type(given) is not type(taken):
        return taken
    if _equal(given.to(taken.device), taken):
        return taken  # codes and scales, which show another dtype
    rounded = _local(given).to(device=taken.device, dtype=taken.dtype)
    return given.to(taken.device) if _equal(rounded, taken) else taken


def _in_place(old: Any, new: Any, apart: Set[int]) -> Any:
    """The tensor that was there, filled, where it has the same form and memory for each element; else the new one."""
    if not (isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor)) or old is new:
        return new
    if id(old) in apart or is_expanded(old):
        return new
    if _form(old) != _form(new):
        return new
    for there, given in zip(_parts(old), _parts(new), strict=True):
        there.copy_(given)
    return old


def _form(tensor: torch.Tensor) -> Any:
    """What two tensors have in common where one can take the other's elements."""
    form = (type(tensor), tensor.shape, tensor.dtype, tensor.device)
    if isinstance(tensor, DTensor):
        return *form, tensor.device_mesh, tensor.placements, _form(tensor.to_local())
    names, context = _names_of_parts(tensor)
    return *form, context, [_form(getattr(tensor, name)) for name in names]


@torch.no_grad()  # else the local tensor of a DTensor is a view, which a class may make by copying
def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that hold a tensor's elements: codes and scales where it is of such a class, or else itself.

    A class's own ``copy_`` may make new codes, and it may have no ``clone`` and no ``equal``.
    """
    local = _local(tensor)
    names, _ = _names_of_parts(local)
    return [part for name in names for part in _parts(getattr(local, name))] or [local.detach()]


def _names_of_parts(tensor: torch.Tensor) -> tuple[list[str], Any]:
    flatten = getattr(tensor, "__tensor_flatten__", None)
    return ([], None) if flatten is None else flatten()


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one shape have the same bits."""
    ones, others = _parts(one), _parts(other)
    if [part.dtype for part in ones] != [part.dtype for part in others]:
        return False
    return all(torch.equal(_bytes(a), _bytes(b)) for a, b in zip(ones, others, strict=True))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """What torch compares for every dtype: not all of float8 are."""
    return tensor.reshape(-1).view(torch.uint8)


def is_expanded(tensor: torch.Tensor) -> bool:
    """Whether several elements share one place in memory, so that they can't be filled."""
    local = _local(tensor)
    return any(stride == 0 and size > 1 for size, stride in zip(local.shape, local.stride(), strict=True))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class _Snapshot:
    """An optimizer's attributes, its state and its groups, without the tensors' elements.

    The elements are kept too where code outside torch.optim takes part in a load: it may write to the tensors.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._attributes = {name: _restorer(value) for name, value in vars(optimizer).items()}
        self._group_list = optimizer.param_groups
        self.groups = [(group, dict(group)) for group in optimizer.param_groups]
        self._state: Any = optimizer.state
        self._entries = dict(optimizer.state)
        self.leaves = {p: flat_entries(entries) for p, entries in optimizer.state.items()}
        tensors = {id(v): v for leaves in self.leaves.values() for v in leaves.values() if isinstance(v, torch.Tensor)}
        self._elements = (
            [(part, part.clone()) for tensor in tensors.values() if not is_expanded(tensor) for part in _parts(tensor)]
            if has_own_load(optimizer)
            else []
        )

    def restore(self) -> None:
        """Make the optimizer what it was."""
        attributes = {name: restore() for name, restore in self._attributes.items()}
        vars(self._optimizer).clear()
        vars(self._optimizer).update(attributes)
        for group, contents in self.groups:
            _refilled(group, contents)
        with torch.no_grad():
            for part, elements in self._elements:
                part.copy_(elements)

    def keep_identity(self, apart: Set[int]) -> None:
        """Put the new state and hyperparameters into the objects that held the old ones."""
        optimizer = self._optimizer
        new: dict[Any, Any] = {p: _refilled(self._entries.get(p), e) for p, e in optimizer.state.items()}
        optimizer.state = _refilled(self._state, new)
        groups = [group for group, _ in self.groups]
        if len(groups) == len(optimizer.param_groups):
            for (group, old), new in zip(self.groups, list(optimizer.param_groups), strict=True):
                _refilled(group, {name: _in_place(old.get(name), value, apart) for name, value in new.items()})
            optimizer.param_groups[:] = groups
            if "param_groups" in vars(optimizer):
                self._group_list[:] = groups
                optimizer.param_groups = self._group_list


def _restorer(tree: Any) -> Callable[[], Any]:
    """A function that gives nested dicts and lists their present contents back, and returns the outermost."""
    if isinstance(tree, dict):
        values = {key: _restorer(value) for key, value in tree.items()}
        return lambda: _refilled(tree, {key: restore() for key, restore in values.items()})
    if isinstance(tree, list):
        items = [_restorer(value) for value in tree]
        return lambda: _refilled(tree, [restore() for restore in items])
    return lambda: tree


def _refilled(container: Any, contents: Any) -> Any:
    """The same dict or list with these contents; nested ones are as in the contents."""
    if container is contents:
        return container
    if isinstance(container, dict):
        container.clear()
        container.update(contents)
        return container
    if isinstance(container, list):
        container[:] = contents
        return container
    return contents
