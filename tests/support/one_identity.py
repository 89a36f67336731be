"""Check that each public class of `shardferry.pipeline`, `.schemas` and `.actors` exists once.

A program of its own, which needs nothing of the tests. In the repository's root the three folders are also packages of
their own names, and must give the same classes; elsewhere packages of these names are somebody else's, and must have none.
"""

from __future__ import annotations

from importlib import import_module

FOLDERS = ("pipeline", "schemas", "actors")


def check() -> str:
    """Fails where a class exists twice. Returns what was compared, in words."""
    counts = {"the same": 0, "ours alone": 0}
    for short in FOLDERS:
        ours, other = import_module(f"shardferry.{short}"), import_module(short)
        is_ours = other.__doc__ == ours.__doc__
        counts["the same" if is_ours else "ours alone"] += len(ours.__all__)
        for name in ours.__all__:
            value = getattr(ours, name)
            assert value.__module__.startswith(f"shardferry.{short}."), value.__module__
            if is_ours:
                assert getattr(other, name) is value, f"{short}.{name} is not shardferry.{short}.{name}"
            else:
                assert not hasattr(other, name), f"{other.__file__} has a {name}"
    return ", ".join(f"{count} names are {kind}" for kind, count in counts.items() if count)


if __name__ == "__main__":
    print(check())
