"""Find an optimizer's state and param groups, and a model's weights, among the keys of a checkpoint, by FQN.

Writers save them under ``<optimizer_key>.state.<fqn>.<name>``, ``<optimizer_key>.param_groups...`` and ``<model_key>.<fqn>``. The
key paths in the metadata record where one component ends. Where they are missing, the dots of a key tell it.

::

    Catalog ── index_optimizer ──► OptimizerIndex ── SavedOptimizer.resolve ──► SavedOptimizer
    keys                           saved names, positions                       wanted names; param groups
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from shardferry.checkpoint.catalog import Catalog, SavedTensor
from shardferry.checkpoint.megatron import BUFFERS, COMMON_FILE, megatron_entry
from shardferry.config import LoadRequest
from shardferry.errors import PlanError
from shardferry.state_dicts import KeyPath, ParamGroup, nest

SCALAR_STATE = frozenset({"step"})  # state that never has its parameter's shape, whatever its size

Positions = Sequence[Sequence[str]]  # FQNs of each param group of the live optimizer, in order

_NAMES = "param_names"  # since torch 2.6 in the param groups of optimizers that were made from named parameters


@dataclass(frozen=True, slots=True)
class StateEntry:
    """One saved entry of one parameter's state: a tensor, or a Python value."""

    key: str  # in the checkpoint
    path: KeyPath  # below the parameter: ("exp_avg",), or ("preconditioners", 0) for an entry of a list

    @property
    def name(self) -> str:
        """The path in dotted form."""
        return ".".join(map(str, self.path))


@dataclass(frozen=True, slots=True)
class OptimizerIndex:
    """The keys of one optimizer in a checkpoint."""

    optimizer_key: str
    state: Mapping[str, Mapping[str, StateEntry]]  # FQN as saved -> state name -> entry
    param_groups: Mapping[KeyPath, str]  # path below "param_groups" -> key
    paths: Mapping[str, KeyPath]  # key -> path below the optimizer's key; also of what is neither state nor param group

    def all_keys(self) -> list[str]:
        """All keys of this optimizer's state and param groups."""
        return [entry.key for names in self.state.values() for entry in names.values()] + list(
            self.param_groups.values()
        )


def index_optimizer(catalog: Catalog, optimizer_key: str | None) -> OptimizerIndex:
    """Look up an optimizer.

    Args:
        optimizer_key: its key in the state dict that was saved, such as ``optim``; ``app.optim`` where that was nested, and
            empty where the optimizer's own state dict was saved. None: no optimizer is wanted.

    Raises:
        PlanError: nothing was saved under this key, or something else than an optimizer; the message names the keys that are
            there.
    """
    if optimizer_key is None:
        return OptimizerIndex("", {}, {}, {})
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
            "dp_zero_gather_scatter), which don't tell where a parameter is; load them with Megatron and save with "
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
        raise _nothing_saved(catalog, f"optimizer_key {optimizer_key!r}")
    by_fqn = _by_fqn(state, _flattened_fqns(groups))
    _check_steps(catalog, {fqn: by_fqn[fqn] for fqn in by_fqn if fqn in of_megatron})
    return OptimizerIndex(optimizer_key, by_fqn, groups, paths)


def index_weights(catalog: Catalog, model_key: str) -> dict[str, str]:
    """Look up a model: the keys of its weights and buffers, by FQN.

    Args:
        model_key: its key in the state dict that was saved; dots lead into nested dicts, and an empty key is the whole of it.

    Raises:
        PlanError: nothing was saved under this key.
    """
    keys = {".".join(map(str, tail)): key for key, tail in _below(catalog, model_key)}
    if not keys:
        raise _nothing_saved(catalog, f"model_key {model_key!r}")
    return keys


def top_level_keys(catalog: Catalog) -> list[str]:
    """The keys of the state dict that was saved, sorted."""
    return sorted({str(_components(catalog, key)[0]) for key in [*catalog.tensors, *catalog.objects]})


def parameter_shape(tensors: Mapping[str, SavedTensor]) -> tuple[int, ...] | None:
    """The shape of a parameter, derived from its saved state: the one shape that all non-scalar state has.

    Args:
        tensors: the parameter's saved state, by state name.

    Returns:
        None if the state has no tensor, or its shapes differ (Adafactor's rows and columns). Then no state may be sharded as
        the parameter is.
    """
    shapes = {tensor.shape for name, tensor in tensors.items() if name not in SCALAR_STATE}
    return shapes.pop() if len(shapes) == 1 else None


def _nothing_saved(catalog: Catalog, key: str) -> PlanError:
    return PlanError(
        f"{catalog.location}: nothing is saved under {key}; "
        f"top-level keys are {', '.join(map(repr, top_level_keys(catalog))) or 'none'}"
    )


def _check_steps(catalog: Catalog, state: Mapping[str, Mapping[str, StateEntry]]) -> None:
    """Megatron-Core keeps its steps outside the metadata. Without them Adam's state is incomplete."""
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
    """``("state", ...)`` -> ``"state"`` and the rest of the path."""
    section, rest = str(tail[0]), tail[1:]
    if not rest and "." in section:  # flattened by the saver: "state.<fqn>.<name>"
        section, _, dotted = section.partition(".")
        return section, (dotted,)
    return section, rest


def _flattened_fqns(groups: Mapping[KeyPath, str]) -> set[str]:
    """FQNs that flattened hyperparameters tell exactly, as the names of hyperparameters have no dots."""
    return {str(path[0]).rpartition(".")[0] for path in groups if len(path) == 1 and isinstance(path[0], str)}


def _by_fqn(state: Mapping[KeyPath, str], known: set[str]) -> dict[str, dict[str, StateEntry]]:
    by_fqn: dict[str, dict[str, StateEntry]] = {}
    for path, key in state.items():
        fqn, below = _split_state(path, known)
        entry = StateEntry(key, below)
        by_fqn.setdefault(fqn, {})[entry.name] = entry
    return by_fqn


def _split_state(path: KeyPath, known: set[str]) -> tuple[str, KeyPath]:
    """FQN and path below it. In a flattened name the longest known FQN decides, otherwise the last dot."""
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


@dataclass(frozen=True)
class SavedOptimizer:
    """One saved optimizer under the wanted names: renamed, selected, and with positions replaced by FQNs."""

    optimizer_key: str
    state: Mapping[str, Mapping[str, StateEntry]]  # FQN -> state name -> entry
    param_groups: tuple[ParamGroup, ...] | None  # "params" lists FQNs; None: they were not read
    names: frozenset[str]  # FQNs of all its parameters, before renaming and selection

    @classmethod
    def resolve(
        cls, index: OptimizerIndex, values: Mapping[str, Any] | None, request: LoadRequest, positions: Positions | None
    ) -> SavedOptimizer:
        """Give every parameter of an index the name that the request wants.

        Args:
            values: the saved Python objects by key; None in a dry run.
            positions: of the live optimizer, for state that was saved by position.

        Raises:
            PlanError: two saved parameters get the same name, or the saved positions are not those of the live optimizer.
        """
        groups = None
        if values is not None:
            groups = build_param_groups({path: values[key] for path, key in index.param_groups.items()})
        names = _positional_names(index, groups, positions) if _is_positional(index, groups) else {}
        naming = _Naming(names, request)
        state: dict[str, Mapping[str, StateEntry]] = {}
        for saved_fqn, entries in index.state.items():
            fqn = naming.fqn(saved_fqn)
            if fqn in state:
                raise PlanError(f"{fqn}: two saved parameters get this name, {saved_fqn!r} is one; narrow the renaming")
            if request.selection.selects(fqn):
                state[fqn] = entries
        named = None if groups is None else tuple(naming.group(group) for group in groups)
        return cls(index.optimizer_key, state, named, naming.names_before(index, groups))

    def groups_of(self, fqns: Collection[str]) -> tuple[ParamGroup, ...] | None:
        """All param groups, with only these parameters in them. Groups that hold none of them stay, with no parameters."""
        if self.param_groups is None:
            return None
        return tuple(
            {**group, "params": [fqn for fqn in group.get("params", ()) if fqn in fqns]} for group in self.param_groups
        )

    @cached_property
    def grouped(self) -> frozenset[str]:
        """FQNs in the param groups."""
        return frozenset(fqn for group in self.param_groups or () for fqn in group.get("params", ()))


def build_param_groups(entries: Mapping[KeyPath, Any]) -> list[ParamGroup]:
    """Rebuild the saved param groups.

    Args:
        entries: saved values by their path below ``param_groups``: ``(0, "lr")`` for a flattened list of groups, ``()``
            for a list saved whole, ``("<fqn>.lr",)`` where the saver had flattened the optimizer's state dict.
    """
    if () in entries:
        return [dict(group) for group in entries[()]]
    flattened: dict[str, ParamGroup] = {}
    nested: dict[KeyPath, Any] = {}
    for path, value in entries.items():
        if len(path) == 1 and isinstance(path[0], str):
            fqn, _, name = path[0].rpartition(".")
            flattened.setdefault(fqn, {"params": [fqn]})[name] = value
        else:
            nested[path] = value
    groups: list[ParamGroup] = nest(nested) or []
    return groups + [flattened[fqn] for fqn in sorted(flattened)]


@dataclass(frozen=True)
class _Naming:
    positions: Mapping[str, str]  # saved position, in digits -> FQN
    request: LoadRequest

    def fqn(self, saved: str | int) -> str:
        return self.request.selection.wanted_name(self._saved_fqn(saved))

    def names_before(self, index: OptimizerIndex, groups: Sequence[ParamGroup] | None) -> frozenset[str]:
        """All saved FQNs before renaming."""
        grouped = (saved for group in groups or () for saved in group.get("params", ()))
        return frozenset(map(self._saved_fqn, (*index.state, *grouped)))

    def group(self, group: ParamGroup) -> ParamGroup:
        fqns = [self.fqn(saved) for saved in group.get("params", ())]
        rest = {name: value for name, value in group.items() if name not in ("params", _NAMES)}
        return {**rest, "params": [fqn for fqn in fqns if self.request.selection.selects(fqn)]}

    def _saved_fqn(self, saved: str | int) -> str:
        return self.positions.get(str(saved), str(saved))


def _is_positional(index: OptimizerIndex, groups: Sequence[ParamGroup] | None) -> bool:
    """Whether a plain ``optimizer.state_dict()`` was saved, in which numbers stand for parameters."""
    listed = [saved for group in groups or () for saved in group.get("params", ())]
    names = listed or list(index.state)
    return bool(names) and all(isinstance(name, int) or name.isdigit() for name in names)


def _positional_names(
    index: OptimizerIndex, groups: Sequence[ParamGroup] | None, positions: Positions | None
) -> dict[str, str]:
    """The FQN of each saved position: from the saved param groups if they have names, otherwise from the live optimizer."""
    if groups and all(len(group.get(_NAMES) or ()) == len(group["params"]) for group in groups):
        return {str(saved): fqn for group in groups for saved, fqn in zip(group["params"], group[_NAMES], strict=True)}
    if positions is None or groups is None:
        return {}  # without a live optimizer the numbers stay names
    saved_sizes, live_sizes = [len(group["params"]) for group in groups], [len(group) for group in positions]
    if saved_sizes != live_sizes:
        raise PlanError(
            f"{index.optimizer_key!r} was saved by position (a plain optimizer.state_dict()): its param groups have {saved_sizes} "
            f"parameters, those of the live optimizer {live_sizes}; make the optimizer as it was when it was saved, or save "
            "with torch.distributed.checkpoint.state_dict.get_optimizer_state_dict, which uses names"
        )
    return {
        str(saved): fqn
        for group, fqns in zip(groups, positions, strict=True)
        for saved, fqn in zip(group["params"], fqns, strict=True)
    }
