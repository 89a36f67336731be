"""Find an optimizer's state and param groups among a checkpoint's keys.

Writers put them at ``<optimizer_key>.state.<fqn>.<name>`` and ``<optimizer_key>.param_groups...``; where one component
ends is recorded in the metadata's key paths, and guessed from the dots only where these are missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shardferry.catalog import Catalog, KeyPath, SavedTensor
from shardferry.errors import PlanError

SCALAR_STATE = frozenset({"step"})  # never has its parameter's shape, whatever its size


@dataclass(frozen=True, slots=True)
class OptimizerIndex:
    """Where one optimizer's entries are in a checkpoint."""

    optimizer_key: str
    state: Mapping[str, Mapping[str, str]]  # FQN -> state name -> key
    param_groups: Mapping[KeyPath, str]  # path below "param_groups" -> key

    def all_keys(self) -> list[str]:
        """All keys of this optimizer."""
        return [key for names in self.state.values() for key in names.values()] + list(self.param_groups.values())


def index_optimizer(catalog: Catalog, optimizer_key: str) -> OptimizerIndex:
    """Look up an optimizer.

    Args:
        optimizer_key: its key in the state dict that was saved, such as ``optim``.

    Raises:
        PlanError: nothing was saved under this key; the message names the keys that are there.
    """
    state: dict[str, dict[str, str]] = {}
    groups: dict[KeyPath, str] = {}
    found = False
    for key in [*catalog.tensors, *catalog.objects]:
        tail = _below(catalog, key, optimizer_key)
        if tail is None:
            continue
        found = True
        section, rest = _split_section(tail)
        if section == "state" and rest:
            fqn, name = _split_state(rest)
            state.setdefault(fqn, {})[name] = key
        elif section == "param_groups":
            groups[rest] = key
    if not found:
        raise PlanError(
            f"{catalog.location}: nothing is saved under optimizer_key {optimizer_key!r}; "
            f"top-level keys are {', '.join(map(repr, top_level_keys(catalog))) or 'none'}"
        )
    if not state and not groups:
        raise PlanError(
            f"{catalog.location}: {optimizer_key!r} holds no optimizer: neither 'state' nor 'param_groups' is below it; "
            f"top-level keys are {', '.join(map(repr, top_level_keys(catalog)))}"
        )
    return OptimizerIndex(optimizer_key, state, groups)


def top_level_keys(catalog: Catalog) -> list[str]:
    """The keys of the state dict that was saved, sorted."""
    return sorted({str(_components(catalog, key)[0]) for key in [*catalog.tensors, *catalog.objects]})


def parameter_shape(tensors: Mapping[str, SavedTensor]) -> tuple[int, ...] | None:
    """The parameter's shape, as its state tells it: the one shape that all non-scalar state shares.

    None where the state has no tensor or its shapes disagree (Adafactor's rows and columns): then nothing may be cut as
    the parameter is.
    """
    shapes = {tensor.shape for name, tensor in tensors.items() if name not in SCALAR_STATE}
    return shapes.pop() if len(shapes) == 1 else None


def _components(catalog: Catalog, key: str) -> KeyPath:
    path = catalog.path(key)
    if len(path) == 1 and path[0] == key and "." in key:
        head, _, tail = key.partition(".")
        return (head, tail)
    return path


def _below(catalog: Catalog, key: str, optimizer_key: str) -> KeyPath | None:
    path = catalog.path(key)
    if path[0] == optimizer_key and len(path) > 1:
        return path[1:]
    if len(path) == 1 and key.startswith(optimizer_key + "."):
        return (key[len(optimizer_key) + 1 :],)
    return None


def _split_section(tail: KeyPath) -> tuple[str, KeyPath]:
    section, rest = str(tail[0]), tail[1:]
    if not rest and "." in section:  # flattened by the saver: "state.<fqn>.<name>"
        section, _, dotted = section.partition(".")
        return section, (dotted,)
    return section, rest


def _split_state(rest: KeyPath) -> tuple[str, str]:
    if len(rest) == 1:
        fqn, _, name = str(rest[0]).rpartition(".")
        return fqn, name
    return str(rest[0]), ".".join(map(str, rest[1:]))
