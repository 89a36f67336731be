"""Put values that were saved flattened back into nested dicts and lists, and flatten them again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

KeyPath = tuple[str | int, ...]  # of a value in nested dicts (by string) and lists (by integer)
ParamGroup = dict[str, Any]  # "params": [fqn, ...], and the hyperparameters by name


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
