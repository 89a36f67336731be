"""Report the content of a checkpoint from its catalog: optimizers, tensors, how they were cut, who wrote them."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from fnmatch import fnmatchcase

import numpy as np

from shardferry.checkpoint.catalog import Catalog, SavedTensor
from shardferry.checkpoint.megatron import COMMON_FILE
from shardferry.checkpoint.optimizer_state import OptimizerIndex, index_optimizer, top_level_keys
from shardferry.errors import PlanError
from shardferry.plan.cover import find_problems
from shardferry.schemas.inspect_report import InspectReport, OptimizerReport, TensorReport

_SECTION = re.compile(r"(?:^|\.)(state|param_groups)(?:\.|$)")  # what stands below an optimizer's key
_STATE_NAMES = {"step", "exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg", "sum"}  # of the optimizers of torch
_RANK_OF_FILE = re.compile(r"__(\d+)_\d+\.distcp")


def inspect_report(catalog: Catalog, *, glob: str | None = None, key: str | None = None) -> InspectReport:
    """Report tensors, sizes, versions, the topology at the time of saving, and problems. Reads no data.

    Args:
        glob: over the tensors' keys; the report lists those that match.
        key: the report lists the tensors that were saved under this key.
    """
    optimizers = find_optimizers(catalog)
    of_optimizers = [entry for index in optimizers for entry in index.all_keys() if entry in catalog.tensors]
    ordered = dict.fromkeys([*of_optimizers, *catalog.tensors])
    shown = [catalog.tensors[name] for name in ordered if is_selected(name, glob, key)]
    return InspectReport(
        location=catalog.location,
        torch_metadata_version=catalog.torch_metadata_version,
        writer=writer_of(catalog),
        num_writers=num_writers(catalog),
        top_level_keys=top_level_keys(catalog),
        optimizers=[_optimizer(catalog, index) for index in optimizers],
        num_tensors=len(catalog.tensors),
        num_objects=len(catalog.objects),
        num_chunks=catalog.num_chunks,
        num_files=len(catalog.files),
        total_bytes=catalog.total_bytes,
        topology=saved_topology(catalog),
        tensors=[_tensor(catalog, saved) for saved in shown],
        problems=find_problems(catalog),
        warnings=[catalog.stale] if catalog.stale else [],
    )


def saved_topology(catalog: Catalog) -> dict[str, int]:
    """How tensors were sharded when they were saved, in words, and the number of tensors; the most frequent first."""
    known: dict[tuple[int, bytes], str] = {}  # a model has a dozen kinds of tensors, and thousands of tensors
    counts: Counter[str] = Counter()
    for saved in catalog.tensors.values():
        kind = (len(saved.shape), catalog.boxes(saved)[0].tobytes())
        if kind not in known:
            known[kind] = _sharding(_grid(catalog, saved))
        counts[known[kind]] += 1
    return dict(counts.most_common())


def find_optimizers(catalog: Catalog) -> list[OptimizerIndex]:
    """The optimizers of a checkpoint, under the keys that `checkpoint.optimizer_key` takes for them."""
    found: dict[str, OptimizerIndex] = {}
    for candidate in _candidates(catalog):
        try:
            found[candidate] = index_optimizer(catalog, candidate)
        except PlanError:  # it only looked like one
            continue
    # A module may be called "state": without param groups, only the names of what is below tell an optimizer.
    with_groups = [index for index in found.values() if index.param_groups and index.state]
    return with_groups or [index for index in found.values() if _STATE_NAMES & set(_state_names(index))]


def _candidates(catalog: Catalog) -> list[str]:
    """The keys below which ``state`` or ``param_groups`` stand."""
    parents: defaultdict[str, set[str]] = defaultdict(set)
    for key in (*catalog.tensors, *catalog.objects):
        path = ".".join(map(str, catalog.path(key)))
        if section := _SECTION.search(path):
            parents[path[: section.start()]].add(path[section.end() :].partition(".")[0])
    per_top = Counter(_top(parent) for parent in parents)
    found: dict[str, None] = {}
    for parent, below in parents.items():
        # Optimizers for one parameter each stand below the parameters' names: what these have in common is their key.
        of_one_parameter = per_top[_top(parent)] > 1 and below <= {"0"}
        found[_top(parent) if of_one_parameter else parent] = None
    return list(found)


def _top(path: str) -> str:
    return path.partition(".")[0]


def writer_of(catalog: Catalog) -> str | None:
    """The program that saved a checkpoint; None where its keys don't tell."""
    keys = set(top_level_keys(catalog))
    if COMMON_FILE in catalog.files:
        return "Megatron-Core"
    if {"train_state", "lr_scheduler", "optimizer"} <= keys:
        return "torchtitan"
    if any(file.endswith(".safetensors") for file in catalog.files):
        return "a writer of safetensors"
    return None


def num_writers(catalog: Catalog) -> int | None:
    """How many ranks wrote files; None where the files' names don't tell."""
    ranks = {found[1] for file in catalog.files if (found := _RANK_OF_FILE.fullmatch(file))}
    return len(ranks) or None


def fold_layers(keys: list[str]) -> tuple[str, int]:
    """One name for keys that differ in numbers only: ``layers.{0..31}.wq.weight``, and how many they are."""
    parts = [key.split(".") for key in keys]
    columns = [sorted({column[row] for column in parts}, key=_as_number) for row in range(len(parts[0]))]
    return ".".join(names[0] if len(names) == 1 else _numbers(names) for names in columns), len(keys)


def alike(tensors: list[TensorReport]) -> list[list[TensorReport]]:
    """The tensors, those together whose names differ in numbers only, and that are alike in all else.

    The numbers of each group are all combinations of those at each place, so that `fold_layers` names nothing else.
    """
    groups: defaultdict[tuple[object, ...], list[TensorReport]] = defaultdict(list)
    for tensor in tensors:
        name = tuple("#" if part.isdecimal() else part for part in tensor.fqn.split("."))
        groups[(name, tuple(tensor.shape), tensor.dtype, tuple(tensor.grid))].append(tensor)
    return [group for together in groups.values() for group in _full_products(together)]


def _full_products(together: list[TensorReport]) -> list[list[TensorReport]]:
    parts = [tensor.fqn.split(".") for tensor in together]
    sizes = [len({column[row] for column in parts}) for row in range(len(parts[0]))]
    if np.prod(sizes) == len(together):
        return [together]
    first = next(row for row, size in enumerate(sizes) if size > 1)
    by_number: defaultdict[str, list[TensorReport]] = defaultdict(list)
    for tensor, name in zip(together, parts, strict=True):
        by_number[name[first]].append(tensor)
    return [group for alone in by_number.values() for group in _full_products(alone)]


def _numbers(names: list[str]) -> str:
    numbers = [int(name) for name in names]
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return f"{{{','.join(names)}}}"


def _as_number(name: str) -> tuple[int, str]:
    return (int(name) if name.isdecimal() else -1, name)


def is_selected(name: str, glob: str | None, key: str | None) -> bool:
    """Whether a tensor's key matches the glob, and stands below the other key; None selects all."""
    below = key is None or name == key or name.startswith(f"{key}.")
    return below and (glob is None or fnmatchcase(name, glob))


def _optimizer(catalog: Catalog, index: OptimizerIndex) -> OptimizerReport:
    entries = [entry for names in index.state.values() for entry in names.values()]
    return OptimizerReport(
        key=index.optimizer_key,
        num_parameters=len(index.state),
        state_names=_state_names(index),
        nbytes=sum(catalog.tensors[entry.key].nbytes for entry in entries if entry.key in catalog.tensors),
    )


def _state_names(index: OptimizerIndex) -> list[str]:
    return list(dict.fromkeys(name for names in index.state.values() for name in names))


def _tensor(catalog: Catalog, saved: SavedTensor) -> TensorReport:
    return TensorReport(
        fqn=saved.key,
        shape=list(saved.shape),
        dtype=str(saved.dtype).removeprefix("torch."),
        num_chunks=len(saved.chunks),
        nbytes=saved.nbytes,
        grid=_grid(catalog, saved),
    )


def _grid(catalog: Catalog, saved: SavedTensor) -> list[int]:
    """The number of chunks along each dimension."""
    offsets, _ = catalog.boxes(saved)
    return [len(np.unique(offsets[:, dim])) for dim in range(len(saved.shape))]


def _sharding(grid: list[int]) -> str:
    parts_by_dim = [f"dim {dim} in {parts}" for dim, parts in enumerate(grid) if parts > 1]
    return ", ".join(parts_by_dim) or "whole"
