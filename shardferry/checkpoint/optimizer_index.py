"""Find an optimizer's state and param groups, and a model's weights, among a checkpoint's keys.

Writers put them at ``<optimizer_key>.state.<fqn>.<name>``, ``<optimizer_key>.param_groups...`` and ``<model_key>.<fqn>``; where
one component ends is recorded in the metadata's key paths, and told from the dots only where these are missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from shardferry.checkpoint.catalog import Catalog, KeyPath, SavedTensor
from shardferry.checkpoint.megatron import BUFFERS, COMMON_FILE, megatron_entry
from shardferry.errors import PlanError

SCALAR_STATE = frozenset({"step"})  # never has its parameter's shape, whatever its size


@dataclass(frozen=True, slots=True)
class StateEntry:
    """One saved entry of one parameter's state: a tensor, or a Python value."""

    key: str  # in the checkpoint
    path: KeyPath  # below the parameter: ("exp_avg",), or ("preconditioners", 0) for one of a list

    @property
    def name(self) -> str:
        return ".".join(map(str, self.path))


@dataclass(frozen=True, slots=True)
class OptimizerIndex:
    """Where one optimizer's entries are in a checkpoint."""

    optimizer_key: str
    state: Mapping[str, Mapping[str, StateEntry]]  # FQN as saved -> state name -> entry
    param_groups: Mapping[KeyPath, str]  # path below "param_groups" -> key
    paths: Mapping[str, KeyPath]  # key -> path below the optimizer's key; also of what is neither state nor param group

    def all_keys(self) -> list[str]:
        """All keys of this optimizer's state and param groups."""
        return [entry.key for names in self.state.values() for entry in names.values()] + list(
            self.param_groups.values()
        )


def index_optimizer(catalog: Catalog, optimizer_key: str) -> OptimizerIndex:
    """Look up an optimizer.

    Args:
        optimizer_key: its key in the state dict that was saved, such as ``optim``; ``app.optim`` where that was nested, and
            empty where the optimizer's own state dict was saved.

    Raises:
        PlanError: nothing was saved under this key, or something else than an optimizer; the message names the keys that are
            there.
    """
    if optimizer_key in catalog.objects:
        raise PlanError(
            f"{catalog.location}: {optimizer_key!r} is one Python object, its tensors in it: it was saved nested and with "
            "flatten_state_dict=False. Save with torch's default planner, or with flatten_optimizer_state_dict=True"
        )
    index = index_keys(catalog, optimizer_key)
    if index.state or index.param_groups:
        return index
    if all(path and _split_section(path)[0] == BUFFERS for path in index.paths.values()):
        raise PlanError(
            f"{catalog.location}: {optimizer_key!r} holds Megatron-Core's flat buffers (dp_reshardable or "
            "dp_zero_gather_scatter), which don't tell where a parameter lies; load them with Megatron and save with "
            "--dist-ckpt-optim-fully-reshardable"
        )
    raise PlanError(
        f"{catalog.location}: {optimizer_key!r} holds no optimizer: neither 'state' nor 'param_groups' is below it; "
        f"top-level keys are {', '.join(map(repr, top_level_keys(catalog)))}"
    )


def index_keys(catalog: Catalog, optimizer_key: str) -> OptimizerIndex:
    """Look up everything that was saved under a key, whether or not it is an optimizer.

    Args:
        optimizer_key: as in `index_optimizer`. A value that was saved under exactly this key has an empty path.

    Raises:
        PlanError: nothing was saved under this key; Megatron-Core's steps are missing.
    """
    state: dict[KeyPath, str] = {}
    groups: dict[KeyPath, str] = {}
    paths = dict(_below(catalog, optimizer_key))
    of_megatron: set[str] = set()
    for key, path in paths.items():
        section, rest = _split_section(path)
        if section == "state" and rest:
            entry = megatron_entry(rest) if catalog.paths is None else None
            if entry:
                of_megatron.add(entry[0])
            state[entry or rest] = key
        elif section == "param_groups":
            groups[rest] = key
    if optimizer_key in catalog.tensors or optimizer_key in catalog.objects:
        paths.setdefault(optimizer_key, ())
    if not paths:
        raise PlanError(
            f"{catalog.location}: nothing is saved under optimizer_key {optimizer_key!r}; "
            f"top-level keys are {', '.join(map(repr, top_level_keys(catalog))) or 'none'}"
        )
    by_fqn = _by_fqn(state, _flattened_fqns(groups))
    _check_steps(catalog, {fqn: by_fqn[fqn] for fqn in by_fqn if fqn in of_megatron})
    return OptimizerIndex(optimizer_key, by_fqn, groups, paths)


def index_weights(catalog: Catalog, model_key: str) -> dict[str, str]:
    """The keys of a model's weights and buffers, by FQN.

    Raises:
        PlanError: nothing was saved under this key.
    """
    keys = {".".join(map(str, tail)): key for key, tail in _below(catalog, model_key)}
    if not keys:
        raise PlanError(
            f"{catalog.location}: nothing is saved under model_key {model_key!r}; "
            f"top-level keys are {', '.join(map(repr, top_level_keys(catalog))) or 'none'}"
        )
    return keys


def _check_steps(catalog: Catalog, state: Mapping[str, Mapping[str, StateEntry]]) -> None:
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


def _below(catalog: Catalog, wanted: str) -> Iterator[tuple[str, KeyPath]]:
    """Every key whose path begins with ``wanted`` (dots lead into nested dicts), and the rest of its path."""
    paths = catalog.paths or {}
    for keys in (catalog.tensors, catalog.objects):
        for key in keys:
            path = paths.get(key) or (key,)
            tail = path[1:] if path[0] == wanted and len(path) > 1 else _tail(path, wanted)
            if tail is not None:
                yield key, tail


def _tail(path: KeyPath, wanted: str) -> KeyPath | None:
    if not wanted:
        return path
    if len(path) == 1 and str(path[0]).startswith(wanted + "."):
        return (str(path[0])[len(wanted) + 1 :],)
    joined = ""
    for count, part in enumerate(path[:-1], start=1):
        joined = f"{joined}.{part}" if joined else str(part)
        if joined == wanted:
            return path[count:]
        if not wanted.startswith(joined + "."):
            return None
    return None


def _split_section(tail: KeyPath) -> tuple[str, KeyPath]:
    section, rest = str(tail[0]), tail[1:]
    if not rest and "." in section:  # flattened by the saver: "state.<fqn>.<name>"
        section, _, dotted = section.partition(".")
        return section, (dotted,)
    return section, rest


def _flattened_fqns(groups: Mapping[KeyPath, str]) -> set[str]:
    """FQNs that flattened hyperparameters tell exactly: their own names have no dots."""
    return {str(path[0]).rpartition(".")[0] for path in groups if len(path) == 1 and isinstance(path[0], str)}


def _by_fqn(state: Mapping[KeyPath, str], known: set[str]) -> dict[str, dict[str, StateEntry]]:
    by_fqn: dict[str, dict[str, StateEntry]] = {}
    for path, key in state.items():
        fqn, below = _split_state(path, known)
        entry = StateEntry(key, below)
        by_fqn.setdefault(fqn, {})[entry.name] = entry
    return by_fqn


def _split_state(path: KeyPath, known: set[str]) -> tuple[str, KeyPath]:
    """FQN and path below it. In a flattened name the longest known FQN decides, else the last dot."""
    if len(path) > 1:
        return str(path[0]), path[1:]
    dotted = str(path[0])
    fqn = dotted
    while "." in fqn:
        fqn = fqn.rpartition(".")[0]
        if fqn in known:
            return fqn, tuple(dotted[len(fqn) + 1 :].split("."))
    fqn, _, name = dotted.rpartition(".")
    return fqn, (name,)
