"""A copy of a live optimizer over tensors without memory: it predicts the state that the optimizer makes, and tries a load.

The copy has the optimizer's attributes, with a meta tensor for each tensor, so that no step and no load of it touches the
live one, allocates memory or reaches another rank. Hooks are left out: they run once, on the live optimizer.

torch.optim.Optimizer's private attributes are named in this file alone; tests/core/test_private_apis.py fails when torch
changes them.
"""

from __future__ import annotations

import copy
import random
import re
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from shardferry.state_dicts import flat_entries

_STEP_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_LOAD_HOOKS = ("_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks")
_FRONT_DOOR = ("step", "state_dict", "load_state_dict", "__setstate__")

# Implementations that need a device. They make the same state as the plain one, but for the device of ``step``.
_PLAIN = {"fused": None, "foreach": False, "capturable": False, "differentiable": False}


class NoShadow(Exception):
    """The optimizer can't be copied, or the copy can't do what was asked; the message says why."""


def has_load_hooks(optimizer: Optimizer) -> bool:
    """Whether functions were registered that `load_state_dict` calls."""
    return any(getattr(optimizer, name, None) for name in _LOAD_HOOKS)


def has_own_load(optimizer: Optimizer) -> bool:
    """Whether code outside torch.optim takes part in `load_state_dict`: an overridden method or a hook."""
    methods = (getattr(type(optimizer), name) for name in ("load_state_dict", "__setstate__"))
    is_patched = "load_state_dict" in vars(optimizer)
    return is_patched or has_load_hooks(optimizer) or any(not _is_of_torch(method) for method in methods)


def _is_of_torch(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).startswith("torch.optim.")


class Shadow:
    """The copy.

    Args:
        optimizer: is left as it is.
        hyperparameters: by param group, instead of the live ones.
        answer: the number that a tensor which comes of one rank's part is said to hold.
        from_nothing: whether it has no state.

    Raises:
        NoShadow: the optimizer can't be copied.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        hyperparameters: Sequence[Mapping[str, Any]] | None = None,
        *,
        answer: int = 1,
        from_nothing: bool = False,
    ) -> None:
        patched = [name for name in _FRONT_DOOR if name in vars(optimizer) and name != "step"]
        if patched:
            raise NoShadow(f"{patched[0]} was replaced on the object")
        self.has_guessed = False
        self._of_one_rank = _OfOneRank(answer)
        with _guarded("a copy"):
            self.optimizer = _copied(optimizer, from_nothing=from_nothing)
        for index, group in enumerate(self.optimizer.param_groups):
            group.update(hyperparameters[index] if hyperparameters is not None else {})
            group.update(plain_hyperparameters(group))

    def narrow(self, chosen: Sequence[Sequence[int]]) -> None:
        """Train the parameters at these positions of each group alone."""
        for group, positions in zip(self.optimizer.param_groups, chosen, strict=True):
            for name in ("params", "param_names"):
                if name in group:
                    group[name] = [group[name][position] for position in positions]

    def step(self) -> None:
        """Take one step with gradients of zero. Raises NoShadow."""
        for parameter in (p for group in self.optimizer.param_groups for p in group["params"]):
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self._of_one_rank.add_parts([parameter, parameter.grad])
        step = type(self.optimizer).step
        if getattr(step, "hooked", False):  # by torch, for hooks that are for all optimizers too
            step = step.__wrapped__  # type: ignore[attr-defined]
        with _guarded("a step", self._of_one_rank) as numbers, torch.no_grad():
            step(self.optimizer)
        self.has_guessed |= numbers.has_guessed

    def load(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict over tensors without memory.

        Raises:
            NoShadow: it can't be tried so.
            Exception: what the optimizer raises of itself.
        """
        with _guarded("load_state_dict", passes_errors=True):
            self.optimizer.load_state_dict(state_dict)

    def predicted(self) -> Predicted:
        """The state in the form of ``state_dict()``. Raises NoShadow."""
        with _guarded("state_dict", self._of_one_rank):
            state_dict = self.optimizer.state_dict()
        groups = state_dict["param_groups"]
        entries = [[state_dict["state"].get(key, {}) for key in group["params"]] for group in groups]
        rest = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        names_in = self._of_one_rank.names_in
        return Predicted(
            entries,
            self.has_guessed,
            shared_state(state_dict),
            groups=rest,
            of_one_rank=[[names_in(entry) for entry in there] for there in entries],
            groups_of_one_rank=frozenset().union(*map(names_in, rest)),
        )

    @property
    def has_answered(self) -> bool:
        """Whether the optimizer has asked for a number that comes of one rank's part."""
        return self._of_one_rank.has_answered


def shared_state(state_dict: Mapping[str, Any]) -> dict[Any, Any]:
    """State under keys that are of no parameter."""
    of_parameters = {key for group in state_dict["param_groups"] for key in group["params"]}
    return {key: value for key, value in state_dict["state"].items() if key not in of_parameters}


def plain_hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a param group says of the implementation, for tensors without memory."""
    return {name: value for name, value in _PLAIN.items() if name in group}


@dataclass(frozen=True)
class Predicted:
    """The state that an optimizer has after its first steps, in the form of ``state_dict()``."""

    entries: Sequence[Sequence[Mapping[Any, Any]]]  # by param group and parameter
    has_guessed: bool  # by a number that isn't known: it may have more or other entries
    shared: Mapping[Any, Any] = field(default_factory=dict)  # state under keys that are of no parameter
    groups: Sequence[Mapping[str, Any]] = ()  # the param groups, without parameters
    # By param group and parameter: dotted names of plain entries that come of this rank's part of it alone.
    of_one_rank: Sequence[Sequence[frozenset[str]]] = ()
    groups_of_one_rank: frozenset[str] = frozenset()  # hyperparameters that do

    def compared(self, other: Predicted) -> Predicted:
        """With the numbers that are others in the other prediction as such of one rank."""
        entries = [
            [names | _differing(*pair) for names, *pair in zip(*three, strict=True)]
            for three in zip(self.of_one_rank, self.entries, other.entries, strict=True)
        ]
        groups = [_differing(*pair) for pair in zip(self.groups, other.groups, strict=True)]
        return replace(self, of_one_rank=entries, groups_of_one_rank=self.groups_of_one_rank.union(*groups))


def _differing(one: Mapping[Any, Any], other: Mapping[Any, Any]) -> frozenset[str]:
    """Dotted names of numbers that are not the same."""
    ones, others = flat_entries(one), flat_entries(other)
    return frozenset(name for name in ones.keys() & others.keys() if _number(ones[name]) != _number(others[name]))


def _number(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "" if value.is_meta or isinstance(value, DTensor) else repr(value.tolist())
    return repr(value) if isinstance(value, int | float) else ""


def predict(
    optimizer: Optimizer, hyperparameters: Sequence[Mapping[str, Any]] | None = None, *, num_steps: int = 1
) -> Predicted:
    """Step a copy of an optimizer. Parameters that look alike are predicted by the first and the last of them.

    Args:
        optimizer: is left as it is.
        hyperparameters: by param group, instead of the live ones.

    Raises:
        NoShadow: the optimizer doesn't step over tensors without memory.
    """
    groups = optimizer.param_groups
    alike = [_alike(index, group["params"]) for index, group in enumerate(groups)]
    ends = [sorted({end for members in there for end in (members[0], members[-1])}) for there in alike]
    everything = [list(range(len(group["params"]))) for group in groups]
    try:
        found = _after_steps(optimizer, hyperparameters, num_steps, ends)
        is_by_form = all(map(_same_at_ends, alike, ends, found.entries))
    except NoShadow:
        is_by_form = False
    if not is_by_form:  # but by a parameter's place
        return _after_steps(optimizer, hyperparameters, num_steps, everything)
    entries, of_one_rank = (
        list(map(_spread, alike, ends, by_group)) for by_group in (found.entries, found.of_one_rank)
    )
    return replace(found, entries=entries, of_one_rank=of_one_rank)


def one_of_each(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> list[list[int]]:
    """By param group, the positions of parameters of which each looks different, itself or in the state dict."""
    chosen = []
    for index, (group, packed) in enumerate(zip(optimizer.param_groups, state_dict["param_groups"], strict=True)):
        firsts: dict[Any, int] = {}
        for kind, members in enumerate(_alike(index, group["params"])):
            for position in members:
                form = _form(state_dict["state"].get(packed["params"][position], {}))
                firsts.setdefault((kind, repr(form)), position)
        chosen.append(sorted(firsts.values()))
    return chosen


def _alike(group: int, parameters: Sequence[torch.Tensor]) -> list[list[int]]:
    """The positions of a group's parameters, ascending, by everything that state is made from."""
    found: dict[Any, list[int]] = {}
    for position, p in enumerate(parameters):
        spec = (p.device_mesh, p.placements, p.to_local().shape) if isinstance(p, DTensor) else None
        found.setdefault((group, p.shape, p.dtype, p.requires_grad, spec), []).append(position)
    return list(found.values())


def _same_at_ends(alike: Sequence[Sequence[int]], ends: Sequence[int], found: Sequence[Mapping[Any, Any]]) -> bool:
    """Whether the first and the last of equal parameters have entries of the same form."""
    at_end = dict(zip(ends, found, strict=True))
    return all(_form(at_end[members[0]]) == _form(at_end[members[-1]]) for members in alike)


def _spread(alike: Sequence[Sequence[int]], ends: Sequence[int], found: Sequence[Any]) -> list[Any]:
    """What was found of the first of equal parameters, for all of them, by position."""
    at_end = dict(zip(ends, found, strict=True))
    by_position = {position: at_end[members[0]] for members in alike for position in members}
    return [by_position[position] for position in sorted(by_position)]


def _form(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _form(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_form(value) for value in tree]
    return (type(tree), tree.shape, tree.dtype) if isinstance(tree, torch.Tensor) else type(tree)


def _after_steps(
    optimizer: Optimizer,
    hyperparameters: Sequence[Mapping[str, Any]] | None,
    num_steps: int,
    chosen: Sequence[Sequence[int]],
) -> Predicted:
    """Step a copy that trains the chosen parameters of each group."""

    def after_steps(*, from_nothing: bool, answer: int = 1) -> Predicted:
        shadow = Shadow(optimizer, hyperparameters, answer=answer, from_nothing=from_nothing)
        shadow.narrow(chosen)
        for _ in range(num_steps):
            shadow.step()
        found = shadow.predicted()
        if not shadow.has_answered or answer != 1:
            return found
        return found.compared(after_steps(from_nothing=from_nothing, answer=2))

    try:
        return after_steps(from_nothing=True)
    except NoShadow:  # state that the constructor makes, as Adagrad's
        return after_steps(from_nothing=False)


def _copied(optimizer: Optimizer, *, from_nothing: bool) -> Optimizer:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    memo: dict[int, Any] = {id(p): torch.nn.Parameter(twin(p), requires_grad=p.requires_grad) for p in parameters}
    shadow: Optimizer = object.__new__(type(optimizer))
    with _TwinsOfTensors():
        for name, value in vars(optimizer).items():
            if name in (*_STEP_HOOKS, *_LOAD_HOOKS):
                shadow.__dict__[name] = OrderedDict()
            elif name == "state" and from_nothing:
                shadow.state = defaultdict(dict)
            elif name != "step":  # where a scheduler has replaced it, it would step the live optimizer
                try:
                    shadow.__dict__[name] = copy.deepcopy(value, memo)
                except Exception:
                    continue  # a step that needs it fails
    return shadow


def twin(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor like another one without memory; a copy of a single number on the CPU, as optimizers look at these."""
    if isinstance(tensor, DTensor):
        return DTensor.from_local(
            _without_memory(tensor.to_local()),
            tensor.device_mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )
    if tensor.numel() == 1 and tensor.ndim == 0 and tensor.device.type == "cpu":
        return tensor.detach().clone()
    return _without_memory(tensor)


def _without_memory(tensor: torch.Tensor) -> torch.Tensor:
    if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided:
        # Not empty_like: for the meta device torch runs that in Python, which takes ten times as long.
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return torch.empty_like(tensor.detach(), device="meta")


def twins(tree: Any) -> Any:
    """A copy of nested dicts and lists, with a twin of each tensor."""
    with _TwinsOfTensors():
        return copy.deepcopy(tree)


class _TwinsOfTensors(TorchFunctionMode):
    """Lets `copy.deepcopy` make twins."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.__deepcopy__, torch.Tensor.clone):
            with torch._C.DisableTorchFunction():
                return twin(args[0])
        return func(*args, **(kwargs or {}))


_SHAPE_ALONE = re.compile(r"(new_)?(empty|zeros|ones|full)(_like|_strided)?$")  # operators that take no elements


class _OfOneRank:
    """The plain tensors that come of one rank's part of a sharded parameter: each rank has others under the same name.

    An operator's results come of what its arguments come of. What a collective returns is taken to be the same on all ranks.
    Numbers that are asked of such a tensor can't be followed: what comes of them differs where another answer is given.
    """

    def __init__(self, answer: int = 1) -> None:
        self._storages: dict[int, Any] = {}  # kept, so that no other one gets the address
        self._answer = answer
        self.has_answered = False

    def add_parts(self, tensors: Sequence[Any]) -> None:
        """Take in the local tensors of DTensors that are sharded."""
        for tensor in tensors:
            if not isinstance(tensor, DTensor) or tensor.device_mesh.size() == 1:
                continue
            if not all(placement.is_replicate() for placement in tensor.placements):
                self._add([tensor._local_tensor])

    def follow(self, func: Any, args: Sequence[Any], results: Any) -> None:
        """Take in what an operator makes of its arguments."""
        made = _tensors(results)
        self.add_parts(made)
        name = func._schema.name.partition("::")[2]
        if func.namespace == "_c10d_functional" or _SHAPE_ALONE.match(name) or not any(map(self._has, _tensors(args))):
            return
        self._add(made)
        if func._schema.is_mutable:
            self._add(_tensors(args[:1]))

    def number_in(self, tensor: torch.Tensor) -> int:
        """What a tensor without memory is said to hold."""
        is_partial = isinstance(tensor, DTensor) and not all(p.is_replicate() for p in tensor.placements)
        if not is_partial and not self._has(tensor):
            return 1
        self.has_answered = True
        return self._answer

    def _add(self, tensors: Sequence[torch.Tensor]) -> None:
        for tensor in tensors:
            if not isinstance(tensor, DTensor):
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = storage

    def names_in(self, entries: Mapping[Any, Any]) -> frozenset[str]:
        """The dotted names of such tensors."""
        return frozenset(name for name, value in flat_entries(entries).items() if self._has(value))

    def _has(self, value: Any) -> bool:
        is_plain = isinstance(value, torch.Tensor) and not isinstance(value, DTensor)
        return is_plain and value.untyped_storage()._cdata in self._storages


def _tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [tensor for one in tree for tensor in _tensors(one)] if isinstance(tree, list | tuple) else []


class _WithoutMemory(TorchDispatchMode):
    """Lets optimizers' code run on tensors without memory.

    A number that is asked of such a tensor is 1 (see `_OfOneRank`). Collectives are refused: the other ranks may not take part in them.
    """

    def __init__(self, of_one_rank: _OfOneRank) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.has_guessed = False  # a decision was made by a number that isn't known
        self._of_one_rank = of_one_rank

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            raise NoShadow(f"it communicates ({func})")
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            dtype = args[0].dtype
            self.has_guessed |= dtype is torch.bool
            return torch.full((), self._of_one_rank.number_in(args[0]), dtype=dtype).item()
        results = func(*args, **(kwargs or {}))
        self._of_one_rank.follow(func, args, results)
        return results


@contextmanager
def _guarded(
    what: str, of_one_rank: _OfOneRank | None = None, *, passes_errors: bool = False
) -> Iterator[_WithoutMemory]:
    """Run an optimizer's code on tensors without memory, and leave random numbers and warnings as they were.

    Nothing is compiled: torch.compile gives up on a function that it meets under a dispatch mode, for the live one too.

    Args:
        of_one_rank: takes in what comes of this rank's parts.
        passes_errors: whether errors that don't come of the lack of memory are the optimizer's own, and raised.
    """
    before, mode = random.getstate(), _WithoutMemory(of_one_rank or _OfOneRank())
    try:
        with (
            warnings.catch_warnings(),
            torch.random.fork_rng(devices=[]),
            torch.compiler.set_stance("force_eager"),
            mode,
        ):
            warnings.simplefilter("ignore")
            yield mode
    except NoShadow:
        raise
    except Exception as error:
        if passes_errors and not comes_of_meta(error):
            raise
        raise NoShadow(f"{what} over tensors without memory: {type(error).__name__}: {error}") from error
    finally:
        random.setstate(before)


def comes_of_meta(error: BaseException) -> bool:
    """Whether an operation failed because its tensors have no memory."""
    return isinstance(error, NotImplementedError) or re.search(r"\bmeta\b", str(error), re.IGNORECASE) is not None
