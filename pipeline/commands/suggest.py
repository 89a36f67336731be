"""Write a stage's spec for a checkpoint and a mesh: ``shardferry init``, and ``shardferry inspect --suggest``."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from shardferry.checkpoint.catalog import Catalog
from shardferry.checkpoint.optimizer_state import (
    OptimizerIndex,
    SavedOptimizer,
    index_optimizer,
    index_weights,
    parameter_shape,
)
from shardferry.config import LoadRequest
from shardferry.errors import PlanError
from shardferry.pipeline.display import human_bytes
from shardferry.pipeline.inspect import find_optimizers, inspect_report
from shardferry.pipeline.preflight import check_topology
from shardferry.plan.planner import saved_weights
from shardferry.schemas.stage_config import StageConfig

# Names of modules that tensor parallelism cuts by their outputs (Shard(0) of the weight) and by their inputs (Shard(1)).
_BY_OUTPUT = frozenset(
    [
        "wq",
        "wk",
        "wv",
        "wqkv",
        "q_proj",
        "k_proj",
        "v_proj",
        "qkv_proj",
        "linear_qkv",
        "w1",
        "w3",
        "gate_proj",
        "up_proj",
        "gate_up_proj",
        "fc1",
        "linear_fc1",
        "lm_head",
    ]
)
_BY_INPUT = frozenset(["wo", "o_proj", "out_proj", "w2", "down_proj", "fc2", "linear_fc2", "linear_proj"])


@dataclass(frozen=True, slots=True)
class Axes:
    """The axes of a mesh, by what their names say that they do."""

    shard: tuple[str, ...]  # cut each parameter
    tensor: tuple[str, ...]  # tensor parallelism
    pipeline: tuple[str, ...]  # give each layer to one stage

    @classmethod
    def of(cls, mesh: Mapping[str, int]) -> Axes:
        """From the names; the only axis of a mesh cuts, whatever its name is, unless it replicates."""
        names = [name for name in mesh if "replicate" not in name and name != "ddp"]
        tensor = tuple(name for name in names if name in ("tp", "mp", "tensor", "model"))
        pipeline = tuple(name for name in names if name in ("pp", "pipe", "pipeline", "stage"))
        shard = tuple(name for name in names if name.startswith(("dp", "fsdp", "shard", "zero")))
        if len(mesh) == 1 and not (tensor or pipeline):
            shard = tuple(names)
        return cls(shard, tensor, pipeline)


def suggested_spec(catalog: Catalog, mesh: Mapping[str, int]) -> str:
    """A commented spec as YAML, which loads the first optimizer of a checkpoint, or its weights if it has none.

    Args:
        mesh: axis name to ranks, outermost first. Which parameters each axis cuts follows from its name, and for tensor
            parallelism from the parameters' names.

    Raises:
        SpecError, LayoutError, PlanError: the checkpoint can't be loaded on this mesh.
    """
    optimizers = find_optimizers(catalog)
    parameters = _parameters(catalog, optimizers[0] if optimizers else None)
    text = "\n".join([*_head(catalog), *_checkpoint(catalog, optimizers), *_topology(parameters, mesh), *_TAIL])
    config = StageConfig.from_values(yaml.safe_load(text), source="the suggested spec")
    assert config.topology is not None
    check_topology(catalog, config.topology.layout(), config.checkpoint.request())
    return text


_TAIL = (
    "# The other sections with their defaults; every field is in docs/spec.md.",
    "# read: {strategy: auto, memory_budget: 1GiB, concurrency: 16}",
    "# handoff: {transport: auto}",
    "# timeouts: {start_s: 120, load_s: 3600, handoff_s: 600}",
    "",
)


def _head(catalog: Catalog) -> Iterator[str]:
    report = inspect_report(catalog)
    ranks = "" if report.num_writers is None else f" by {report.num_writers} rank{'s' * (report.num_writers != 1)}"
    yield f"# A stage's spec for {catalog.location}; `shardferry plan` shows what it would read, `shardferry run` runs it."
    for optimizer in report.optimizers:
        names = ", ".join(optimizer.state_names)
        yield (
            f"# In it: the optimizer {optimizer.key!r}, {optimizer.num_parameters} parameters with {names}, "
            f"{human_bytes(optimizer.nbytes)}."
        )
    cut = "; ".join(f"{count} x {sharding}" for sharding, count in report.topology.items())
    yield f"# Saved{ranks} as: {cut}."


def _checkpoint(catalog: Catalog, optimizers: Sequence[OptimizerIndex]) -> Iterator[str]:
    location = catalog.location if "://" in catalog.location else str(Path(catalog.location).absolute())
    yield "checkpoint:"
    yield f"  location: {json.dumps(location)}"
    key = _model_key(catalog, optimizers)
    if optimizers:
        yield f"  optimizer_key: {json.dumps(optimizers[0].optimizer_key)}"
        for other in optimizers[1:]:
            yield f"  # optimizer_key: {json.dumps(other.optimizer_key)}  # there too"
        if key is not None:
            yield f"  # model_key: {json.dumps(key)}  # loads the weights too"
    else:
        yield "  optimizer_key: null  # there is none"
        yield f"  model_key: {json.dumps(key or '')}"


def _model_key(catalog: Catalog, optimizers: Sequence[OptimizerIndex]) -> str | None:
    """The key of the weights: ``model``, beside the first optimizer. None where nothing was saved under it."""
    beside = optimizers[0].optimizer_key.rpartition(".")[0] if optimizers else ""
    key = f"{beside}.model" if beside else "model"
    try:
        index_weights(catalog, key)
    except PlanError:
        return None
    return key


def _parameters(catalog: Catalog, index: OptimizerIndex | None) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters by FQN, as the spec's globs match them; of state without its parameter's shape, none."""
    if index is None:
        request = LoadRequest(optimizer_key=None, model_key=_model_key(catalog, []) or "")
        keys = saved_weights(catalog, request, index_optimizer(catalog, None))
        return {fqn: catalog.tensors[key].shape for fqn, key in keys.items() if key in catalog.tensors}
    shapes = {}
    for fqn, entries in SavedOptimizer.resolve(index, None, LoadRequest(), None).state.items():
        tensors = {name: catalog.tensors[e.key] for name, e in entries.items() if e.key in catalog.tensors}
        if (shape := parameter_shape(tensors)) is not None:
            shapes[fqn] = shape
    return shapes


def _topology(parameters: Mapping[str, tuple[int, ...]], mesh: Mapping[str, int]) -> Iterator[str]:
    axes = Axes.of(mesh)
    yield "topology:"
    yield f"  mesh: {{{', '.join(f'{name}: {size}' for name, size in mesh.items())}}}  # axis: ranks, outermost first"
    rules = list(_tensor_rules(parameters, axes)) if axes.tensor else []
    if rules:
        yield "  rules:  # by parameter; the first match wins"
        yield from rules
    default = _flow(dict.fromkeys(axes.shard, "Shard(0)"))
    yield f"  default: {default}  # all other parameters; axes that are not named replicate"
    held_by = list(_held_by(parameters, mesh, axes)) if axes.pipeline else []
    if held_by:
        yield "  held_by:  # parameters outside of these are on all stages"
        yield from held_by


def _tensor_rules(parameters: Mapping[str, tuple[int, ...]], axes: Axes) -> Iterator[str]:
    """A rule for each family of matrices that tensor parallelism cuts, by the name of their module."""
    families: dict[str, str] = {}
    for fqn, shape in parameters.items():
        *_, module, _ = ("", *fqn.split("."))
        if module in _BY_OUTPUT or (module in _BY_INPUT and len(shape) > 1):
            dim = 0 if module in _BY_OUTPUT else 1
            placements = {**dict.fromkeys(axes.shard, "Shard(0)"), **dict.fromkeys(axes.tensor, f"Shard({dim})")}
            families.setdefault(_glob(fqn), _flow(placements))
    for glob, flow in families.items():
        yield f"    - {{match: {json.dumps(glob)}, placements: {flow}}}"


def _held_by(parameters: Mapping[str, tuple[int, ...]], mesh: Mapping[str, int], axes: Axes) -> Iterator[str]:
    """Each numbered layer on one stage, in equal runs."""
    layers: defaultdict[str, set[int]] = defaultdict(set)
    for fqn in parameters:
        parts = fqn.split(".")
        place = next((row for row, part in enumerate(parts) if part.isdecimal()), None)
        if place is not None:
            layers[".".join(parts[:place])].add(int(parts[place]))
    axis = axes.pipeline[0]
    for prefix, numbers in layers.items():
        for row, number in enumerate(sorted(numbers)):
            stage = row * mesh[axis] // len(numbers)
            yield f"    - {{match: {json.dumps(f'{prefix}.{number}.*'.lstrip('.'))}, ranks: {{{axis}: [{stage}]}}}}"


def _glob(fqn: str) -> str:
    """Numbers become stars: ``layers.*.wq.weight``."""
    return ".".join("*" if part.isdecimal() else part for part in fqn.split("."))


def _flow(placements: Mapping[str, str]) -> str:
    return "{" + ", ".join(f"{axis}: {json.dumps(text)}" for axis, text in placements.items()) + "}"
