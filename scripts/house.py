"""Print the figures of the core's structure and compare them with their limits; exit status 1 where one is broken.

The core is `shardferry/` without `pipeline/`, `actors/` and `schemas/`, which are symbolic links there. What is counted:

- *Files per folder*: the .py files of each folder, ``__init__.py`` included; the three packages' folders too.
- *Levels of imports*: the longest chain of modules of the core that import one another. A module that imports none has
  level 1, any other has one more than the highest of those that it imports. All import statements count, wherever they stand.
  ``from a.b import c`` imports the module ``a.b.c`` if there is one. Otherwise it imports ``a.b``; if that is a package whose
  ``__init__.py`` has ``c`` from another module, it imports that module. An ``__init__.py`` itself is no importer: its re-exports
  are counted where they are used.
- *Circles*: chains of imports that return to where they began.
- *Lines*: of all files, blank lines and comments included.
- *Calls with more than five positional arguments*; ``*arguments`` is one.
- *Imports under TYPE_CHECKING* of modules of the core. The package's face, `shardferry/__init__.py`, is exempt: it gives
  a type checker the names that are imported on first use.
- *Lazy imports*: inside a function, of anything but a package that may not be installed.
"""

from __future__ import annotations

import ast
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

CORE = "shardferry"
LINKED = ("pipeline", "actors", "schemas")
ALWAYS_INSTALLED = {CORE, "numpy", "torch", *sys.stdlib_module_names}

MAX_FILES, MAX_LEVELS, MAX_POSITIONAL = 16, 9, 5
GOAL_LINES = 12_000  # not reached: the figure must not grow until it is
MAX_LINES = 17_772


@dataclass(frozen=True)
class Module:
    """One file of the core."""

    name: str  # dotted, without ``.__init__``
    path: Path
    is_package: bool
    text: str
    tree: ast.Module = field(repr=False)


@dataclass(frozen=True)
class Figure:
    """One line of the output."""

    name: str
    value: int
    limit: int | None  # None: printed only
    remark: str = ""
    offenders: Sequence[str] = ()  # named where the limit is broken

    @property
    def is_broken(self) -> bool:
        return self.limit is not None and self.value > self.limit


def read_core(root: Path) -> dict[str, Module]:
    """The core's modules by name.

    Args:
        root: the repository's root.
    """
    modules = {}
    for path in sorted(python_files(root / CORE)):
        parts = path.relative_to(root).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        text = path.read_text(encoding="utf-8")
        modules[name] = Module(name, path.relative_to(root), is_package, text, ast.parse(text))
    return modules


def python_files(folder: Path) -> Iterator[Path]:
    """Below a folder, but not in the packages that are linked into the core."""
    for parent, folders, names in os.walk(folder):
        if Path(parent) == folder:
            folders[:] = [name for name in folders if name not in LINKED]
        yield from (Path(parent) / name for name in names if name.endswith(".py"))


def import_graph(modules: Mapping[str, Module]) -> dict[str, set[str]]:
    """By module, the modules of the core that it imports."""
    graph = {}
    for module in modules.values():
        imported = set() if module.is_package else {target for target, _ in imports_of(module, modules)}
        graph[module.name] = imported - {module.name}
    return graph


def imports_of(module: Module, modules: Mapping[str, Module]) -> Iterator[tuple[str, ast.stmt]]:
    """The modules of the core that a module's import statements name, and the statements."""
    for node in ast.walk(module.tree):
        yield from ((target, node) for target in targets_of(node, module, modules))


def targets_of(node: ast.AST, module: Module, modules: Mapping[str, Module]) -> list[str]:
    """The modules of the core that a statement imports; none where it is no import."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name in modules]
    if isinstance(node, ast.ImportFrom):
        package = absolute(node, module)
        found = [home_of(package, alias.name, modules) for alias in node.names]
        return [name for name in found if name is not None]
    return []


def absolute(node: ast.ImportFrom, module: Module) -> str:
    """The module that stands after ``from``, without leading dots."""
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    base = parts[: len(parts) - node.level + module.is_package]
    return ".".join([*base, *([node.module] if node.module else [])])


def home_of(package: str, name: str, modules: Mapping[str, Module]) -> str | None:
    """The module of the core that ``from package import name`` imports; None where it is not of the core."""
    if f"{package}.{name}" in modules:
        return f"{package}.{name}"
    found = modules.get(package)
    if found is None:
        return None
    if found.is_package:
        for node in found.tree.body:
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return home_of(absolute(node, found), alias.name, modules) or package
    return package


def levels_and_circles(graph: Mapping[str, set[str]]) -> tuple[dict[str, int], list[list[str]]]:
    """Each module's level, and the circles. The import that closes a circle counts for no level."""
    levels: dict[str, int] = {}
    circles: list[list[str]] = []
    path: list[str] = []

    def visit(name: str) -> int:
        if name not in levels:
            path.append(name)
            highest = 0
            for target in sorted(graph[name]):
                if target in path:
                    circles.append([*path[path.index(target) :], target])
                else:
                    highest = max(highest, visit(target))
            path.pop()
            levels[name] = highest + 1
        return levels[name]

    for name in sorted(graph):
        visit(name)
    return levels, circles


def longest_chain(graph: Mapping[str, set[str]], levels: Mapping[str, int]) -> list[str]:
    """One chain of imports of as many modules as there are levels, from the highest down."""
    chain = [max(sorted(levels), key=levels.__getitem__)]
    while levels[chain[-1]] > 1:
        wanted = levels[chain[-1]] - 1
        chain.append(next(name for name in sorted(graph[chain[-1]]) if levels[name] == wanted))
    return chain


def long_calls(modules: Mapping[str, Module]) -> list[str]:
    """Calls with too many positional arguments."""
    return [
        f"{module.path}:{node.lineno}: {len(node.args)} positional arguments"
        for module in modules.values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and len(node.args) > MAX_POSITIONAL
    ]


def imports_for_types(modules: Mapping[str, Module]) -> list[str]:
    """Imports of the core under ``if TYPE_CHECKING``, but for those of the package's face."""
    found = []
    for module in modules.values():
        for block in ast.walk(module.tree):
            if module.name != CORE and isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test):
                for node in (inner for statement in block.body for inner in ast.walk(statement)):
                    found += [
                        f"{module.path}:{node.lineno}: {target}"
                        for target in targets_of(node, module, modules)
                        if isinstance(node, ast.stmt)
                    ]
    return found


def lazy_imports(modules: Mapping[str, Module]) -> list[str]:
    """Imports inside functions of what is always installed."""
    found = {}
    for module in modules.values():
        for function in ast.walk(module.tree):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                for node in ast.walk(function):
                    for name in imported_names(node, module):
                        if isinstance(node, ast.stmt) and name.split(".")[0] in ALWAYS_INSTALLED:
                            found[f"{module.path}:{node.lineno}: {name}"] = None
    return list(found)


def imported_names(node: ast.AST, module: Module) -> list[str]:
    """The dotted names that a statement imports from, of whatever package."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [absolute(node, module)] if isinstance(node, ast.ImportFrom) else []


def longest_function(modules: Mapping[str, Module]) -> tuple[int, str]:
    """Its lines, decorators left out and docstring included, and where it is."""
    found = [
        (node.end_lineno - node.lineno + 1, f"{node.name}, {module.path}:{node.lineno}")
        for module in modules.values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
    ]
    return max(found, default=(0, "there is none"))


def files_per_folder(root: Path) -> Counter[str]:
    """The number of .py files by folder."""
    folders = [root / name for name in (CORE, *LINKED)]
    return Counter(
        path.parent.relative_to(root).as_posix()
        for folder in folders
        if folder.is_dir()
        for path in python_files(folder)
    )


def figures(root: Path) -> list[Figure]:
    """All figures of the repository at ``root``."""
    modules = read_core(root)
    graph = import_graph(modules)
    levels, circles = levels_and_circles(graph)
    chain = longest_chain(graph, levels)
    folders = files_per_folder(root)
    counts = ", ".join(f"{folder.removeprefix(f'{CORE}/')} {count}" for folder, count in folders.most_common())
    full = [f"{folder}: {count} files" for folder, count in folders.most_common() if count > MAX_FILES]
    function_lines, function = longest_function(modules)
    calls, typing, lazy = long_calls(modules), imports_for_types(modules), lazy_imports(modules)
    around = [" -> ".join(circle) for circle in circles]
    num_lines = sum(module.text.count("\n") for module in modules.values())
    return [
        Figure("files in a folder", max(folders.values()), MAX_FILES, counts, full),
        Figure("levels of imports", len(chain), MAX_LEVELS, f"from {chain[0]}", [" -> ".join(chain)]),
        Figure("circles of imports", len(circles), 0, offenders=around),
        Figure("lines of the core", num_lines, MAX_LINES, f"in {len(modules)} files; the goal is {GOAL_LINES:,}"),
        Figure("longest function, lines", function_lines, None, function),
        Figure(f"calls with over {MAX_POSITIONAL} positional arguments", len(calls), 0, offenders=calls),
        Figure("imports under TYPE_CHECKING", len(typing), 0, offenders=typing),
        Figure("lazy imports", len(lazy), 0, offenders=lazy),
    ]


def main(root: Path) -> int:
    """Print the figures; 1 where a limit is broken."""
    found = figures(root)
    for figure in found:
        limit = "" if figure.limit is None else f"limit {figure.limit:,}"
        mark = "BROKEN" if figure.is_broken else "" if figure.limit is None else "ok"
        print(f"{figure.name:<45}{figure.value:>7,}  {limit:<13}{mark:<8}{figure.remark}".rstrip())
        for offender in figure.offenders if figure.is_broken else ():
            print(f"    {offender}")
    return int(any(figure.is_broken for figure in found))


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent.parent))
