"""Train, save, load and train on: one optimizer under one wrapper, against the run that was not interrupted.

The functions run on the ranks of a process group, many optimizers in one group.
"""

from __future__ import annotations

import copy
import gc
import io
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import shardferry
from shardferry.errors import ShardferryError
from shardferry.state_dicts import flat_entries
from tests.support.ranks import DEADLINE_S, RankPool

T = TypeVar("T")

SAVES_ONE_RANKS = "state that is not a DTensor differs from rank to rank, and torch saves one rank's"
NUM_STEPS = 6  # before the save
LR = 2.0**-6


@dataclass(frozen=True)
class Case:
    """An optimizer with its arguments."""

    name: str
    make: Callable[[nn.Module, float], Any]  # from a model and a learning rate
    width: int = 8  # of the network: some treat only large parameters in their own way
    sparse: bool = False  # whether it wants sparse gradients
    closure: bool = False  # whether its step wants one


@dataclass(frozen=True)
class Wrapper:
    """How a model is wrapped, and on how many ranks it is saved and loaded."""

    name: str
    wrap: Callable[[nn.Module], nn.Module]
    source: int
    target: int


def _fsdp2(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


WRAPPERS = (
    Wrapper("plain", lambda model: model, 1, 1),
    Wrapper("DDP", DistributedDataParallel, 2, 2),
    Wrapper("FSDP2 4 → 2", _fsdp2, 4, 2),
    Wrapper("FSDP2 2 → 3", _fsdp2, 2, 3),
)

Verdict = Literal["right", "rounded", "refused", "cannot", "wrong"]


@dataclass(frozen=True)
class Outcome:
    """What a case came to.

    ``right``: state, groups and next step are bitwise those of the uninterrupted run. ``rounded``: the next step is so but
    for rounding, as it sums over another number of ranks. ``refused``: by an error, and nothing was changed. ``cannot``: the
    optimizer doesn't train, or torch doesn't save it. ``wrong``: a defect.
    """

    verdict: Verdict
    words: str = ""


def as_plain(found: Mapping[str, Outcome]) -> dict[str, tuple[str, str]]:
    """Outcomes as a report may carry them from one test process to another."""
    return {optimizer: (outcome.verdict, outcome.words) for optimizer, outcome in found.items()}


def network(inner: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inner, inner), nn.Linear(inner, inner, bias=False), nn.Linear(inner, 3))


def named_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): parameter for name, parameter in model.named_parameters()}


def step(case: Case, model: nn.Module, optimizer: Any, number: int) -> None:
    """Take a step. Gradients depend on the element and on the weights, not on the wrapper."""
    parameters = named_parameters(model)

    def closure() -> torch.Tensor:
        for fqn, parameter in parameters.items():
            whole = _noise(fqn, tuple(parameter.shape), number)
            grad = _like(whole, parameter) + 0.125 * parameter.detach()
            parameter.grad = grad.to_sparse() if case.sparse else grad
        return torch.tensor(1.0 / number)

    closure()
    torch.manual_seed(number)
    if case.closure:
        optimizer.step(closure)
    else:
        optimizer.step()


@cache
def _noise(fqn: str, shape: tuple[int, ...], number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * number + sum(map(ord, fqn)))
    return torch.randn(shape, generator=generator)


def _like(whole: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """The same part of a whole tensor as a live one has; no rank sends anything."""
    if not isinstance(live, DTensor):
        return whole
    return distribute_tensor(whole, live.device_mesh, live.placements, src_data_rank=None)


# --- what an optimizer has ------------------------------------------------------------------------------------------


def entries_of(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Weights, state and hyperparameters by name."""
    parameters = named_parameters(model)
    names = {id(parameter): fqn for fqn, parameter in parameters.items()}
    found: dict[str, Any] = {f"model.{fqn}": parameter.detach() for fqn, parameter in parameters.items()}
    for parameter, state in optimizer.state.items():
        if isinstance(state, dict):
            found |= {
                f"state.{names.get(id(parameter), parameter)}.{name}": value
                for name, value in flat_entries(state).items()
            }
    for index, group in enumerate(optimizer.param_groups):
        found |= {
            f"group.{index}.{name}": value
            for name, value in flat_entries(group).items()
            if not name.startswith("params.") and not isinstance(value, nn.Parameter)
        }
    return found


def whole_entries(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """The same with whole tensors, which nothing changes afterwards."""
    return {name: _whole(value) for name, value in entries_of(model, optimizer).items()}


def _whole(value: Any) -> Any:
    return _copied(value.full_tensor() if isinstance(value, DTensor) else value)


def _copied(value: Any) -> Any:
    value = _plain_data(value)
    if isinstance(value, dict):
        return {name: inner.detach().clone() for name, inner in value.items()}
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _plain_data(value: Any) -> Any:
    """A tensor of a class of its own, such as a quantised one, as the tensors that it consists of."""
    if isinstance(value, torch.Tensor) and hasattr(value, "__tensor_flatten__") and not isinstance(value, DTensor):
        return {name: getattr(value, name) for name in value.__tensor_flatten__()[0]}
    return value


def same(one: Any, other: Any) -> bool:
    """Bitwise; both whole or both local."""
    one, other = _plain_data(one), _plain_data(other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if (type(one), one.dtype, one.shape) != (type(other), other.dtype, other.shape):
            return False
        if one.is_sparse or one.numel() == 0:
            return True
        return torch.equal(_bytes(one), _bytes(other))
    if type(one) is not type(other):
        return False
    if isinstance(one, float) and math.isnan(one):
        return math.isnan(other)
    try:
        return bool(one == other) or type(one).__eq__ is object.__eq__
    except (ValueError, RuntimeError):
        return False


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def differences(model: nn.Module, optimizer: Any, whole: dict[str, Any]) -> list[str]:
    """Names of the entries that differ from whole ones of another run."""
    found = entries_of(model, optimizer)
    return [
        name
        for name in sorted({*found, *whole})
        if name not in found or name not in whole or not _is_part_of(found[name], whole[name])
    ]


def _is_part_of(found: Any, whole: Any) -> bool:
    if isinstance(found, DTensor) and isinstance(whole, torch.Tensor) and found.shape == whole.shape:
        return same(found.to_local(), _like(whole, found).to_local())
    return same(found, whole)


def rounding_only(model: nn.Module, optimizer: Any, whole: dict[str, Any], names: Sequence[str]) -> bool:
    """Whether entries differ by less than a thousandth of the largest one."""
    found = entries_of(model, optimizer)
    for name in names:
        one, other = found.get(name), whole.get(name)
        if isinstance(one, DTensor):
            one, other = one.to_local(), _like(other, one).to_local()
        if isinstance(one, float) and isinstance(other, float):
            one, other = torch.tensor(one), torch.tensor(other)
        if not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)):
            return False
        if one.shape != other.shape or one.dtype != other.dtype or not one.is_floating_point():
            return False
        if one.numel() and (one - other).abs().max() > 1e-3 * other.abs().max().clamp(min=1e-6):
            return False
    return True


# --- on the ranks ---------------------------------------------------------------------------------------------------


Cases = Callable[[], Sequence[Case]]  # a function that ranks can import, as the makers in a case can't be sent to them


def save_all(directory: str, wrapper: int, cases: Cases, which: Sequence[int]) -> list[Outcome | None]:
    """Train and save some of the cases; None where one was saved."""
    everything = cases()
    return [_agreed(_save, Path(directory) / str(index), WRAPPERS[wrapper], everything[index]) for index in which]


def load_all(directory: str, wrapper: int, cases: Cases, which: Sequence[int]) -> list[Outcome]:
    """Load some of the cases, and train on."""
    everything = cases()
    found = [_agreed(_load, Path(directory) / str(index), WRAPPERS[wrapper], everything[index]) for index in which]
    return [outcome or Outcome("right") for outcome in found]


def _agreed(work: Callable[..., Outcome | None], *args: Any) -> Outcome | None:
    """The worst outcome of all ranks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            own = work(*args)
        except Exception as error:
            own = Outcome("wrong", words_of(error))
    outcomes: list[Outcome | None] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, own)
    order = ("wrong", "cannot", "refused", "rounded", "right")
    found = [outcome for outcome in outcomes if outcome is not None]
    return min(found, key=lambda outcome: order.index(outcome.verdict), default=None)


class Failed(Exception):
    """Work has failed on a rank; in that rank's words, on all ranks."""


def together(path: Path, work: Callable[[], T]) -> T:
    """Call a function that communicates. Where it fails on one rank, it fails on all, and none waits for another.

    The rank that fails ends its process groups, in which the others may wait for it; then all form a new one.

    Args:
        path: a file for the new group to meet at; one of this call's own.

    Raises:
        Failed: on all ranks.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    words, result = "", None
    everyone = [""] * world_size
    try:
        result = work()
    except (Exception, CheckpointException) as error:
        words = words_of(error)
    if words or not _gathered(everyone, words):
        dist.distributed_c10d._abort_process_group()  # of all groups: a mesh may have its own
        gc.collect()  # models hold them, and their threads spin
        timeout = timedelta(seconds=DEADLINE_S / 2)
        store = dist.FileStore(str(path), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
        dist.all_gather_object(everyone, words)
    failures = sorted(
        filter(None, everyone), key=lambda one: "by peer" in one
    )  # what a rank says whose peer has ended it
    if failures:
        raise Failed(failures[0])
    return result  # type: ignore[return-value]


def _gathered(everyone: list[str], words: str) -> bool:
    """Whether no rank has ended the process group."""
    try:
        dist.all_gather_object(everyone, words)
    except RuntimeError:
        return False
    return True


def words_of(error: BaseException) -> str:
    """An error in one line; of torch's checkpointing the error behind it."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


def _save(directory: Path, wrapper: Wrapper, case: Case) -> Outcome | None:
    def train() -> tuple[Any, ...]:
        model, optimizer = _trained(wrapper, case, LR, range(1, NUM_STEPS + 1))
        before = whole_entries(model, optimizer)
        optim = _optimizer_state_dict(model, optimizer)
        dcp.save({"model": get_model_state_dict(model), "optim": optim}, checkpoint_id=str(directory / "ckpt"))
        state_dict = _copy_of_tree(optimizer.state_dict())
        step(case, model, optimizer, NUM_STEPS + 1)
        return before, whole_entries(model, optimizer), state_dict, _differing(optim)

    try:
        before, after, state_dict, differing = together(directory / "meet-to-save", train)
    except Failed as error:
        return Outcome("cannot", str(error))
    try:
        work = partial(_lost_by_stock, wrapper, case, state_dict, before, after)
        lost: list[str] | str = together(directory / "meet-for-stock", work)
    except Failed as error:
        lost = str(error)
    if dist.get_rank() == 0:
        torch.save((before, after, lost, differing), directory / "oracle.pt")
    return None


def _copy_of_tree(state_dict: dict[str, Any]) -> dict[str, Any]:
    try:
        return copy.deepcopy(state_dict)
    except NotImplementedError:  # quantised tensors that can't be cloned can be saved
        file = io.BytesIO()
        torch.save(state_dict, file)
        file.seek(0)
        return torch.load(file, weights_only=False)


def _lost_by_stock(
    wrapper: Wrapper, case: Case, state_dict: dict[str, Any], before: dict[str, Any], after: dict[str, Any]
) -> list[str]:
    """What the optimizer's own state dict doesn't bring back: the entries that differ after the next step."""
    model, optimizer = _trained(wrapper, case, LR / 2, ())
    with torch.no_grad():
        for fqn, parameter in named_parameters(model).items():
            parameter.copy_(_like(before[f"model.{fqn}"], parameter))
    optimizer.load_state_dict(state_dict)
    step(case, model, optimizer, NUM_STEPS + 1)
    return differences(model, optimizer, after)


def _trained(wrapper: Wrapper, case: Case, lr: float, steps: Iterable[int]) -> tuple[nn.Module, Any]:
    model = wrapper.wrap(network(case.width))
    optimizer = case.make(model, lr)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for number in steps:
        step(case, model, optimizer, number)
    return model, optimizer


def _optimizer_state_dict(model: nn.Module, optimizer: Any) -> Any:
    """By name; by position where torch's function doesn't take the optimizer."""
    try:
        return get_optimizer_state_dict(model, optimizer)
    except Exception:
        return optimizer.state_dict()


def _differing(state_dict: Any) -> str | None:
    """The first entry, not sharded, that other ranks have with another value."""
    if dist.get_world_size() == 1:
        return None
    own = {
        name: hash(_bytes(value).numpy().tobytes()) if isinstance(value, torch.Tensor) else repr(value)
        for name, value in flat_entries(state_dict).items()
        if not isinstance(value, DTensor) and not hasattr(value, "__tensor_flatten__")
    }
    everyone: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return next((name for name in own if any(there.get(name) != own[name] for there in everyone)), None)


def _load(directory: Path, wrapper: Wrapper, case: Case) -> Outcome | None:
    """Into an optimizer before its first step, and into one that has stepped."""
    oracle = torch.load(directory / "oracle.pt", weights_only=False)
    outcomes = [_load_one(directory, wrapper, case, range(101, 101 + stepped), *oracle) for stepped in (0, 2)]
    return next((outcome for outcome in outcomes if outcome is not None), None)


def _load_one(
    directory: Path,
    wrapper: Wrapper,
    case: Case,
    steps: Sequence[int],
    before: dict[str, Any],
    after: dict[str, Any],
    lost: list[str] | str,
    differing: str | None,
) -> Outcome | None:
    meet = directory / f"meet-after-{len(steps)}"
    try:
        model, optimizer = together(meet.with_suffix(".train"), partial(_trained, wrapper, case, LR / 2, steps))
    except Failed as error:
        return Outcome("cannot", str(error))
    untouched = local_entries(model, optimizer)

    def load() -> str:
        try:
            shardferry.load_optimizer_state(model, optimizer, directory / "ckpt", model_key="model")
        except ShardferryError as error:
            return words_of(error).replace(str(directory), "…")
        return ""

    try:
        refused = together(meet.with_suffix(".load"), load)
    except Failed as error:
        return Outcome("wrong", str(error))
    if refused:
        now = local_entries(model, optimizer)
        changed = [n for n in {*now, *untouched} if not same(now.get(n), untouched.get(n))]
        return Outcome("wrong", f"{changed[0]} was changed: {refused}") if changed else Outcome("refused", refused)
    if differing is not None:
        return Outcome("cannot", f"{SAVES_ONE_RANKS}: {differing}")
    wrong = differences(model, optimizer, before)
    if _on_any_rank(bool(wrong)):
        return Outcome("wrong", f"loaded {_said(model, optimizer, before, wrong)}") if wrong else None
    try:
        together(meet.with_suffix(".next"), partial(step, case, model, optimizer, NUM_STEPS + 1))
    except Failed as error:
        return Outcome("cannot" if isinstance(lost, str) else "wrong", f"the next step: {error}")
    wrong = differences(model, optimizer, after)
    if not _on_any_rank(bool(wrong)):
        return None
    may_round = wrapper.source != wrapper.target or lost
    if may_round and not _on_any_rank(not rounding_only(model, optimizer, after, wrong)):
        return Outcome("rounded")
    if wrapper.source != wrapper.target:
        by_hand = together(meet.with_suffix(".by-hand"), partial(_step_by_hand, wrapper, case, before))
        if not _on_any_rank(bool(differences(model, optimizer, by_hand))):
            return Outcome("rounded")
    if not wrong:
        return None
    if lost:
        return Outcome(
            "cannot", "its own state_dict() and load_state_dict() don't bring back all that its next step needs"
        )
    return Outcome("wrong", f"next step {_said(model, optimizer, after, wrong)}")


def _on_any_rank(answer: bool) -> bool:
    """Whether it is so on some rank: what follows communicates, and all ranks have to go the same way."""
    answers = [answer] * dist.get_world_size()
    dist.all_gather_object(answers, answer)
    return any(answers)


def _step_by_hand(wrapper: Wrapper, case: Case, before: dict[str, Any]) -> dict[str, Any]:
    """What the next step gives on these ranks, where weights and state are filled in by hand."""
    model, optimizer = _trained(wrapper, case, LR, range(1, NUM_STEPS + 1))
    with torch.no_grad():
        for name, live in entries_of(model, optimizer).items():
            if isinstance(live, torch.Tensor) and isinstance(before.get(name), torch.Tensor):
                live.copy_(_like(before[name], live))
    step(case, model, optimizer, NUM_STEPS + 1)
    return whole_entries(model, optimizer)


def local_entries(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """What this rank has, copied."""
    return {name: _copied(_local(value)) for name, value in entries_of(model, optimizer).items()}


def _local(value: Any) -> Any:
    return value.to_local() if isinstance(value, DTensor) else value


def _said(model: nn.Module, optimizer: Any, whole: dict[str, Any], names: Sequence[str]) -> str:
    found = entries_of(model, optimizer)
    name = names[0]
    return f"{len(names)} entries differ, {name}: {_short(found.get(name, 'nothing'))}, not {_short(whole.get(name, 'nothing'))}"


def _short(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{type(value).__name__} {value.dtype} {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r}"[:80]


def run_table(
    ranks: RankPool, directory: Path, wrapper: int, cases: Cases, which: Sequence[int] | None = None
) -> dict[str, Outcome]:
    """Cases under one wrapper, by name; all where it isn't said which."""
    spec, everything = WRAPPERS[wrapper], cases()
    which = range(len(everything)) if which is None else which
    for index in which:
        (directory / str(index)).mkdir(parents=True)
    found = dict(zip(which, ranks.run(spec.source, save_all, str(directory), wrapper, cases, which)[0], strict=True))
    saved = [index for index, outcome in found.items() if outcome is None]
    found |= zip(saved, ranks.run(spec.target, load_all, str(directory), wrapper, cases, saved)[0], strict=True)
    return {everything[index].name: outcome for index, outcome in found.items()}
