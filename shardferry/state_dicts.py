"""Put values that were saved flattened back into nested dicts and lists, and flatten them again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

KeyPath = tuple[str | int, ...]  # of a value in nested dicts (by string) and lists (by integer)
WEIGHTS = "<model_location>"  # before keys and file names of another checkpoint, which has the weights
EXTRA_STATE = "_extra_state"  # as torch.nn.Module.state_dict names it
ParamGroup = dict[str, Any]  # "params": [fqn, ...], and the hyperparameters by name


@dataclass(frozen=True, slots=True)
class LeftLive:
    """Stands for a saved value of classes that are not plain data: the live value stays."""

    class_names: tuple[str, ...]


def nest(entries: Mapping[KeyPath, Any]) -> Any:
    """``{("a", 0, "b"): 1}`` -> ``{"a": [{"b": 1}]}``: integers in a path are positions in a list."""
    tree: dict[Any, Any] = {}
    for path, value in entries.items():
        branch = tree
        for part in path[:-1]:
            branch = branch.setdefault(part, {})
        branch[path[-1]] = value
    return _with_lists(tree)


def _with_lists(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    values = {key: _with_lists(value) for key, value in tree.items()}
    if values and all(isinstance(key, int) for key in values):
        return [values[key] for key in sorted(values)]
    return values


def flat_entries(tree: Mapping[Any, Any]) -> dict[str, Any]:
    """``{"a": [{"b": 1}]}`` -> ``{"a.0.b": 1}``: leaves by dotted name."""
    return dict(_leaves("", tree))


def _leaves(prefix: str, tree: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, Mapping | list | tuple):
        yield prefix, tree
        return
    for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
        yield from _leaves(f"{prefix}.{key}" if prefix else str(key), value)


def with_keys_of(form: Any, tree: Any) -> Any:
    """A tree with the keys and tuples of another one of the same names: savers turn every key of a dict into a string.

    Args:
        form: ``{"a": {0.5: x}, "b": (x, x)}``, for one.
        tree: ``{"a": {"0.5": y}, "b": [y, y]}``, which becomes ``{"a": {0.5: y}, "b": (y, y)}``.
    """
    if isinstance(tree, dict) and isinstance(form, Mapping):
        keys = {str(key): key for key in form}
        return {keys.get(name, name): with_keys_of(form.get(keys.get(name)), value) for name, value in tree.items()}
    if isinstance(tree, list) and isinstance(form, list | tuple):
        forms = [*form, *[None] * (len(tree) - len(form))]
        values = [with_keys_of(there, value) for there, value in zip(forms, tree, strict=False)]
        return values if isinstance(form, list) else _tuple_like(form, values)
    return tree


def _tuple_like(form: tuple[Any, ...], values: list[Any]) -> tuple[Any, ...]:
    return type(form)(*values) if hasattr(form, "_fields") else tuple(values)


def map_leaves(tree: Any, change: Callable[[str, Any], Any], prefix: str = "") -> Any:
    """The same tree with each leaf changed, dicts and lists in place. ``change`` gets a leaf's dotted name and the leaf."""
    if isinstance(tree, dict):
        for key in tree:
            tree[key] = map_leaves(tree[key], change, f"{prefix}.{key}" if prefix else str(key))
        return tree
    if isinstance(tree, list | tuple):
        values = [map_leaves(value, change, f"{prefix}.{i}" if prefix else str(i)) for i, value in enumerate(tree)]
        if isinstance(tree, list):
            tree[:] = values
            return tree
        return _tuple_like(tree, values)
    return change(prefix, tree)
