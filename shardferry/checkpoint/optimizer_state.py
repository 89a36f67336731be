"""Find an optimizer's state and param groups, and a model's weights, among the keys of a checkpoint, by FQN.

Writers save them under ``<optimizer_key>.state.<fqn>.<name>``, ``<optimizer_key>.param_groups...`` and ``<model_key>.<fqn>``.
The key paths in the metadata, or else the dots of a key, tell where one component ends.

::

    Catalog ── index_optimizer ──► OptimizerIndex ── SavedOptimizer.resolve ──► SavedOptimizer
    keys                           saved names, positions                       wanted names; param groups
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

from shardferry.checkpoint.catalog import Catalog, SavedTensor
from shardferry.checkpoint.megatron import BUFFERS, COMMON_FILE, megatron_entry
from shardferry.config import LoadRequest
from shardferry.errors import PlanError
from shardferry.state_dicts import WEIGHTS, KeyPath, LeftLive, ParamGroup, nest

SCALAR_STATE = frozenset({"step"})  # state that never has its parameter's shape, whatever its size

_UNREAD = LeftLive(())

Positions = Sequence[Sequence[str]]  # FQNs of each param group of the live optimizer, in order

_OF_ONE = "of one parameter"  # before the FQN, in the path of a hyperparameter of an optimizer for one parameter
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

    shared: Mapping[KeyPath, str] = field(
        default_factory=dict
    )  # ("state", name) -> key: single values, of no parameter

    @property
    def names_beside_positions(self) -> frozenset[str]:
        """Names in ``state`` beside numbers. Where the numbers are positions of parameters, they are of no parameter."""
        names = [name for name in self.state if not name.isdigit()]
        return frozenset(name for name in names if "." not in name) if len(names) < len(self.state) else frozenset()

    def extras(self, beside: Collection[str] | None = None) -> dict[KeyPath, str]:
        """What the optimizer's ``state_dict()`` had that is no parameter's and no param group's: path -> key.

        Of a whole checkpoint, what stands beside ``state`` is not the optimizer's.

        Args:
            beside: the names in ``state`` that are of no parameter; default: all that may be.
        """
        if not (self.state or self.shared or self.param_groups):
            return {}
        extras = dict(self.shared)
        for name in self.names_beside_positions if beside is None else beside:
            extras |= {("state", name, *entry.path): entry.key for entry in self.state[name].values()}
        if self.optimizer_key:
            of_others = set(self.all_keys())
            extras |= {path: key for key, path in self.paths.items() if path and key not in of_others}
        return extras

    def all_keys(self) -> list[str]:
        """All keys of this optimizer's state and param groups."""
        entries = (entry for names in self.state.values() for entry in names.values())
        return [*(entry.key for entry in entries), *self.shared.values(), *self.param_groups.values()]


def index_optimizer(catalog: Catalog, optimizer_key: str | None) -> OptimizerIndex:
    """Look up an optimizer.

    Args:
        optimizer_key: its key in the state dict that was saved, such as ``optim``; ``app.optim`` where that was nested, and
            empty where the optimizer's own state dict was saved. None: no optimizer is wanted.

    Raises:
        PlanError: nothing was saved under this key, or something else than an optimizer; names the keys that are there.
    """
    if optimizer_key is None:
        return OptimizerIndex("", {}, {}, {})
    if optimizer_key in catalog.objects:
        raise PlanError(
            f"{catalog.location}: {optimizer_key!r} is one Python object, its tensors in it: it was saved nested and with "
            "flatten_state_dict=False. Save with torch's default planner, or with flatten_optimizer_state_dict=True"
        )
    index = index_keys(catalog, optimizer_key)
    if index.state or index.shared or index.param_groups:
        return index
    if all(path and _split_section(path)[0] == BUFFERS for path in index.paths.values()):
        raise PlanError(
            f"{catalog.location}: {optimizer_key!r} holds Megatron-Core's flat buffers (dp_reshardable or "
            "dp_zero_gather_scatter), which don't tell where a parameter is; load them with Megatron and save with "
            "--dist-ckpt-optim-fully-reshardable"
        )
    raise _not_there(catalog, f"{optimizer_key!r} holds no optimizer: neither 'state' nor 'param_groups' is below it")


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
    _check_paths(catalog, optimizer_key, paths)
    of_megatron: dict[str, None] = {}
    for key, path in paths.items():
        section, rest = _split_section(path)
        if section == "state" and rest:
            entry = megatron_entry(rest) if catalog.paths is None else None
            if entry:
                of_megatron[entry[0]] = None
            state[entry or rest] = key
        elif section == "param_groups":
            groups[rest] = key
    if paths and not (state or groups):
        state, groups = _below_parameters(paths)
    if optimizer_key in catalog.tensors or optimizer_key in catalog.objects:
        paths.setdefault(optimizer_key, ())
    if not paths:
        raise _not_there(catalog, f"nothing is saved under optimizer_key {optimizer_key!r}")
    # Flattened hyperparameters tell FQNs exactly, as the names of hyperparameters have no dots.
    known = {path[0].rpartition(".")[0] for path in groups if path and isinstance(path[0], _Flattened)}
    by_fqn: dict[str, dict[str, StateEntry]] = {}
    shared: dict[KeyPath, str] = {}
    for path, key in state.items():
        fqn, below = _split_state(path, known)
        if not fqn:
            shared["state", *below] = key
            continue
        entry_of_state = StateEntry(key, below)
        if (other := by_fqn.setdefault(fqn, {}).setdefault(entry_of_state.name, entry_of_state)).key != key:
            raise PlanError(
                f"{catalog.location}: {other.key!r} and {key!r} both are {entry_of_state.name!r} of the parameter {fqn}"
            )
    if lacking := [fqn for fqn in of_megatron if "exp_avg" in by_fqn[fqn] and "step" not in by_fqn[fqn]]:
        raise _no_step(catalog, lacking, len(of_megatron))
    return OptimizerIndex(optimizer_key, by_fqn, groups, paths, shared)


def index_weights(catalog: Catalog, model_key: str) -> dict[str, str]:
    """Look up a model: the keys of its weights and buffers, by FQN.

    Args:
        model_key: its key in the state dict that was saved; dots lead into nested dicts, and an empty key is the whole of it.

    Raises:
        PlanError: nothing was saved under this key.
    """
    wanted = ".".join(filter(None, (WEIGHTS, model_key))) if catalog.model_location else model_key
    keys = {".".join(map(str, tail)): key for key, tail in _below(catalog, wanted)}
    if not keys:
        raise _not_there(catalog, f"nothing is saved under model_key {model_key!r}", of_weights=True)
    return keys


def top_level_keys(catalog: Catalog, *, of_weights: bool = False) -> list[str]:
    """The keys of the state dict that was saved, sorted.

    Args:
        of_weights: of the one that has the weights, where that is another checkpoint.
    """
    root = WEIGHTS if of_weights and catalog.model_location else ""
    return sorted(
        {str(tail[0]).partition(".")[0] if len(tail) == 1 else str(tail[0]) for _, tail in _below(catalog, root)}
    )


def parameter_shape(tensors: Mapping[str, SavedTensor]) -> tuple[int, ...] | None:
    """The shape of a parameter: the one that all its non-scalar state has. ``tensors`` is its saved state by name.

    None if the state has no tensor, or its shapes differ (Adafactor's rows and columns): no state may be sharded as the
    parameter is.
    """
    shapes = {tensor.shape for name, tensor in tensors.items() if name not in SCALAR_STATE}
    return shapes.pop() if len(shapes) == 1 else None


def _not_there(catalog: Catalog, what: str, *, of_weights: bool = False) -> PlanError:
    keys = ", ".join(map(repr, top_level_keys(catalog, of_weights=of_weights)))
    where = catalog.weights_location if of_weights else catalog.location
    return PlanError(f"{where}: {what}; top-level keys are {keys or 'none'}")


def _no_step(catalog: Catalog, lacking: Sequence[str], num_parameters: int) -> PlanError:
    known = [problem for problem in catalog.problems if problem.startswith(COMMON_FILE)]
    why = known[0] if known else f"there is no {COMMON_FILE}, or it holds none for this optimizer"
    return PlanError(
        f"{lacking[0]}: no step ({len(lacking)} of {num_parameters} parameters have none), which Megatron-Core keeps in "
        f"{catalog.location}/{COMMON_FILE}: {why}. Where it names classes that you trust, allow them with "
        "torch.serialization.add_safe_globals before the checkpoint is opened; else save again"
    )


def _below(catalog: Catalog, wanted: str) -> Iterator[tuple[str, KeyPath]]:
    """Every key whose path begins with ``wanted`` (dots lead into nested dicts), and the rest of its path.

    Weights of another checkpoint are below `WEIGHTS` alone.
    """
    is_elsewhere = wanted.startswith(WEIGHTS)
    for key in chain(catalog.tensors, catalog.objects):
        if key.startswith(WEIGHTS) == is_elsewhere and (tail := _tail(catalog.path(key), wanted)) is not None:
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


def _check_paths(catalog: Catalog, optimizer_key: str, paths: Mapping[str, KeyPath]) -> None:
    """Every path is one value's, and every value that the metadata lists there is stored. Raises PlanError."""
    for key, path in (catalog.paths or {}).items():
        if key not in catalog.tensors and key not in catalog.objects and _tail(path, optimizer_key) is not None:
            raise PlanError(f"{catalog.location}: {key}: planner_data lists it, and nothing is stored under this key")
    keys: dict[tuple[str, ...], str] = {}
    for key, path in paths.items():
        if (other := keys.setdefault(tuple(map(str, path)), key)) != key:
            raise PlanError(f"{catalog.location}: {other!r} and {key!r} both stand at {'.'.join(map(str, path))}")
    above: set[tuple[str, ...]] = set()
    for names, key in keys.items():
        parent = names[:-1]
        while parent and parent not in above:
            if parent in keys:
                raise PlanError(f"{catalog.location}: {keys[parent]!r} is one value, and {key!r} stands below it")
            above.add(parent)
            parent = parent[:-1]


def _below_parameters(paths: Mapping[str, KeyPath]) -> tuple[dict[KeyPath, str], dict[KeyPath, str]]:
    """State and hyperparameters of optimizers for one parameter each, saved below its name: ``<fqn>.state.0.exp_avg``."""
    state: dict[KeyPath, str] = {}
    groups: dict[KeyPath, str] = {}
    for key, path in paths.items():
        parts = path if len(path) > 1 else tuple(str(path[0]).split("."))
        names = [str(part) for part in parts]
        for section, found in (("state", state), ("param_groups", groups)):
            at = next((i for i in range(1, len(names)) if names[i] == section), None)
            if at is not None and names[at + 1 : at + 2] in ([], ["0"]):
                rest = parts[at + 2 :]
                found[
                    (".".join(names[:at]), *rest) if section == "state" else (_OF_ONE, ".".join(names[:at]), *rest)
                ] = key
    return {path: key for path, key in state.items() if len(path) > 1}, groups


def _split_section(tail: KeyPath) -> tuple[str, KeyPath]:
    """``("state", ...)`` -> ``"state"`` and the rest of the path."""
    section, rest = str(tail[0]), tail[1:]
    name, _, dotted = section.partition(".")
    if dotted and name in ("state", "param_groups", BUFFERS):  # flattened by the saver: "state.<fqn>.<name>"
        return name, (_Flattened(dotted), *rest)
    return section, rest


class _Flattened(str):
    """An FQN and the name of a state entry or a hyperparameter, joined by dots."""

    __slots__ = ()


def _split_state(path: KeyPath, known: set[str]) -> tuple[str, KeyPath]:
    """FQN and path below it. In a flattened name the longest known FQN decides, otherwise the last dot."""
    dotted, rest = str(path[0]), path[1:]
    if rest and not isinstance(path[0], _Flattened):
        return dotted, rest
    fqn = dotted
    while "." in fqn:
        fqn = fqn.rpartition(".")[0]
        if fqn in known:
            return fqn, (*dotted[len(fqn) + 1 :].split("."), *rest)
    fqn, _, name = dotted.rpartition(".")
    return fqn, (name, *rest)


@dataclass(frozen=True)
class SavedOptimizer:
    """One saved optimizer under the wanted names: renamed, selected, and with positions replaced by FQNs."""

    optimizer_key: str
    state: Mapping[str, Mapping[str, StateEntry]]  # FQN -> state name -> entry
    param_groups: tuple[ParamGroup, ...] | None  # "params" lists FQNs; None: they were not read
    names: frozenset[str]  # FQNs of all its parameters, before renaming and selection
    # As ``state``, of the parameters that are not selected.
    unselected: Mapping[str, Mapping[str, StateEntry]] = field(default_factory=dict)
    # What the optimizer's state_dict() had beside state and param groups.
    extras: Mapping[str, Any] = field(default_factory=dict)

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
            read = {path: values[key] for path, key in index.param_groups.items()}
            groups = build_param_groups({p: value for p, value in read.items() if not isinstance(value, LeftLive)})
        grouped = [saved for group in groups or () for saved in group.get("params", ())]
        beside: Collection[str] = index.names_beside_positions
        numbers = grouped or [name for name in index.state if name not in beside]
        by_position = bool(numbers) and all(isinstance(number, int) or number.isdigit() for number in numbers)
        names = _positional_names(index, groups, positions) if by_position else {}
        beside = beside if by_position else ()
        saved_state = {saved: entries for saved, entries in index.state.items() if saved not in beside}

        def name_of(saved: str | int) -> str:
            return names.get(str(saved), str(saved))

        selection, saved_names = request.selection, frozenset(map(name_of, (*saved_state, *grouped)))
        wanted = selection.wanted_names(saved_names)
        state: dict[str, Mapping[str, StateEntry]] = {}
        unselected: dict[str, Mapping[str, StateEntry]] = {}
        for saved, entries in saved_state.items():
            for fqn in wanted[name_of(saved)]:
                if fqn in state:
                    raise PlanError(f"{fqn}: two saved parameters get this name, {saved!r} is one; narrow the renaming")
                (state if selection.selects(fqn) else unselected)[fqn] = entries
        read = {path: (values or {}).get(key, _UNREAD) for path, key in index.extras(beside).items()}
        extras = nest({path: value for path, value in read.items() if not isinstance(value, LeftLive)})
        named = []
        for group in groups or ():
            rest = {name: value for name, value in group.items() if name not in ("params", _NAMES)}
            fqns = [fqn for saved in group.get("params", ()) for fqn in wanted[name_of(saved)]]
            named.append({**rest, "params": [fqn for fqn in fqns if selection.selects(fqn)]})
        param_groups = None if groups is None else tuple(named)
        return cls(index.optimizer_key, state, param_groups, saved_names, unselected=unselected, extras=extras)

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

    Raises:
        PlanError: a group is empty.
    """
    if () in entries:
        return [dict(group) for group in entries[()]]
    flattened: dict[str, dict[KeyPath, Any]] = {}
    nested: dict[KeyPath, Any] = {}
    for path, value in entries.items():
        if path[0] == _OF_ONE:
            fqn, names = str(path[1]), path[2:]
            group = flattened.setdefault(fqn, {})
            if names != ("params",):  # a number: its only parameter
                group |= {names: value} if names else {(name,): x for name, x in value[0].items() if name != "params"}
        elif isinstance(path[0], str) and (len(path) == 1 or isinstance(path[0], _Flattened)):
            fqn, _, name = path[0].rpartition(".")
            flattened.setdefault(fqn, {})[(name, *path[1:])] = value
        else:
            nested[path] = value
    stored = sorted({path[0] for path in nested if isinstance(path[0], int)})
    if stored != list(range(len(stored))):
        lacking = next(number for number in range(len(stored) + 1) if number not in stored)
        raise PlanError(
            f"param_groups[{lacking}]: nothing of it is stored, and {len(stored)} other param groups are: {stored}"
        )
    groups: list[ParamGroup] = nest(nested) or []
    return groups + [{"params": [fqn], **nest(flattened[fqn])} for fqn in sorted(flattened)]


def _positional_names(
    index: OptimizerIndex,
    groups: Sequence[ParamGroup] | None,
    positions: Positions | None,
) -> dict[str, str]:
    """The FQN of each saved position, where a plain ``optimizer.state_dict()`` was saved, in which numbers stand for parameters.

    It is from the saved param groups if they have names, otherwise from the live optimizer.
    """
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
