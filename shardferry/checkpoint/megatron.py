"""Turn the values that Megatron-Core writes beside its tensors into objects of a catalog: the step and the param groups.

A ``torch_dist`` checkpoint has a tensor ``optimizer.state.<name>.<fqn>`` for each state of a parameter. All values that are
not sharded tensors are in ``common.pt``. Formats: megatron/core/dist_checkpointing/optimizer.py and
megatron/core/optimizer/distrib_optimizer.py of Megatron-Core 0.16; docs/writers.md lists those that are supported.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from shardferry.checkpoint.catalog import Catalog, KnownValue, SavedObject
from shardferry.state_dicts import KeyPath

COMMON_FILE = "common.pt"
BUFFERS = "distributed"  # the section of `dp_reshardable` and `dp_zero_gather_scatter`, in the place of "state"

_OPTIMIZER = "optimizer"
_STATE = f"{_OPTIMIZER}.state."
# State of its optimizers for each parameter; `param` and `fp32_param` are the master weights.
_STATE_NAMES = frozenset({"exp_avg", "exp_avg_sq", "momentum_buffer", "fp32_param", "param", "step"})
_AMBIGUOUS = "param"  # also a usual last component of a parameter's own name

logger = logging.getLogger(__name__)


def megatron_entry(tail: KeyPath) -> tuple[str, str] | None:
    """FQN and state name of ``("<name>.<fqn>",)``, a key without a recorded path; None for any other path.

    Every other writer puts the name last, so a key that ends in a name is taken as theirs.
    """
    if len(tail) != 1:
        return None
    name, _, fqn = str(tail[0]).partition(".")
    last = fqn.rpartition(".")[2]
    if not fqn or name not in _STATE_NAMES or (last in _STATE_NAMES and last != _AMBIGUOUS):
        return None
    return fqn, name


def with_common_values(catalog: Catalog, common: bytes) -> Catalog:
    """Add the objects that ``common.pt`` holds for the optimizer: a step for each FQN, and the param groups.

    The file is read with ``torch.load(weights_only=True)``. If that refuses it, the catalog gets a problem instead.

    Args:
        common: the bytes of ``common.pt``.
    """
    keys = [key.removeprefix(_STATE) for key in catalog.tensors if key.startswith(_STATE)]
    fqns = list(dict.fromkeys(entry[0] for key in keys if (entry := megatron_entry((key,)))))
    if catalog.paths is not None or not fqns:
        return catalog
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # inert; Megatron-LM's own arguments
            values = torch.load(io.BytesIO(common), map_location="cpu", weights_only=True)
        known = dict(_known_values(values, fqns))
    except Exception as error:  # a file of another writer raises nearly any type
        refused = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))  # else the first line: torch writes a page
        why = f"it holds a {refused[1]}" if refused else next(iter(str(error).splitlines()), type(error).__name__)
        problem = (
            f"{COMMON_FILE}: not readable as plain values ({why}); the optimizer's step and param groups are unknown"
        )
        return dataclasses.replace(catalog, problems=(*catalog.problems, problem))
    if not known:
        return catalog
    files = (*catalog.files, COMMON_FILE)
    objects = {key: SavedObject(key, len(catalog.files), 0, 0, KnownValue(value)) for key, value in known.items()}
    return dataclasses.replace(catalog, files=files, objects={**catalog.objects, **objects})


def _known_values(common: Any, fqns: list[str]) -> Iterable[tuple[str, Any]]:
    optimizer = _mapping(_mapping(common).get(_OPTIMIZER))
    optimizer = _mapping(optimizer.get(_OPTIMIZER, optimizer))  # one level deeper if there are master weights
    groups = [dict(group) for group in optimizer.get("param_groups", ())]
    steps = {float(group.pop("step")) for group in groups if "step" in group}
    step = _mapping(optimizer.get("state")).get("common_step", steps.pop() if len(steps) == 1 else None)
    if step is not None:
        yield from ((f"{_STATE}step.{fqn}", torch.tensor(float(step))) for fqn in fqns)
    if not groups:
        return
    if any(group != groups[0] for group in groups[1:]):
        logger.warning(
            "%s: %d param groups that differ, and Megatron doesn't record which parameters are in which; "
            "the live optimizer keeps its own hyperparameters",
            COMMON_FILE,
            len(groups),
        )
        return
    yield f"{_OPTIMIZER}.param_groups", [{**groups[0], "params": fqns}]


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}
