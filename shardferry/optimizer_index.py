"""Find an optimizer's state and param groups among a checkpoint's keys.

Writers put them at ``<optimizer_key>.state.<fqn>.<name>`` and ``<optimizer_key>.param_groups...``; where one component
ends is recorded in the metadata's key paths, and guessed from the dots only where these are missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shardferry.catalog import Catalog, KeyPath, SavedTensor
from shardferry.errors import PlanError
from shardferry.megatron import BUFFERS, COMMON_FILE, megatron_entry

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
    sections: set[str] = set()
    of_megatron: set[str] = set()
    for key in [*catalog.tensors, *catalog.objects]:
        tail = _below(catalog, key, optimizer_key)
        if tail is None:
            continue
        section, rest = _split_section(tail)
        sections.add(section)
        if section == "state" and rest:
            entry = megatron_entry(rest) if catalog.paths is None else None
            fqn, name = entry or _split_state(rest)
            if entry:
                of_megatron.add(fqn)
            state.setdefault(fqn, {})[name] = key
        elif section == "param_groups":
            groups[rest] = key
    if optimizer_key in catalog.objects:
        raise PlanError(
            f"{catalog.location}: {optimizer_key!r} is one Python object, its tensors in it: it was saved nested and with "
            "flatten_state_dict=False. Save with torch's default planner, or with flatten_optimizer_state_dict=True"
        )
    if not sections:
        raise PlanError(
            f"{catalog.location}: nothing is saved under optimizer_key {optimizer_key!r}; "
            f"top-level keys are {', '.join(map(repr, top_level_keys(catalog))) or 'none'}"
        )
    if sections == {BUFFERS}:
        raise PlanError(
            f"{catalog.location}: {optimizer_key!r} holds Megatron-Core's flat buffers (dp_reshardable or "
            "dp_zero_gather_scatter), which don't tell where a parameter lies; load them with Megatron and save with "
            "--dist-ckpt-optim-fully-reshardable"
        )
    if not state and not groups:
        raise PlanError(
            f"{catalog.location}: {optimizer_key!r} holds no optimizer: neither 'state' nor 'param_groups' is below it; "
            f"top-level keys are {', '.join(map(repr, top_level_keys(catalog)))}"
        )
    _check_steps(catalog, {fqn: state[fqn] for fqn in state if fqn in of_megatron})
    return OptimizerIndex(optimizer_key, state, groups)


def _check_steps(catalog: Catalog, state: Mapping[str, Mapping[str, str]]) -> None:
    """Megatron-Core's steps stand outside its metadata: without them Adam's state is only half there."""
    lacking = [fqn for fqn, names in state.items() if "exp_avg" in names and "step" not in names]
    if not lacking:
        return
    known = [problem for problem in catalog.problems if problem.startswith(COMMON_FILE)]
    why = known[0] if known else f"there is no {COMMON_FILE}, or it holds none for this optimizer"
    raise PlanError(
        f"{lacking[0]}: no step ({len(lacking)} of {len(state)} parameters have none), which Megatron-Core keeps in "
        f"{catalog.location}/{COMMON_FILE}: {why}. Where it names classes that you trust, allow them with "
        "torch.serialization.add_safe_globals before the checkpoint is opened; else save again"
    )


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
