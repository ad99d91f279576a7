"""The files of phi4/ and phi4_kernels/ and what they import, read from the syntax trees.

Nothing is imported to be read. Imports inside functions and under TYPE_CHECKING count: a cycle
that is dodged is a cycle.
"""

import ast
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

Graph = Mapping[str, set[str]]
"""Names, and the names that each of them imports. Every name is a key."""


@dataclass(frozen=True)
class Import:
    """One imported module, and where."""

    module: str
    line: int
    lazy: bool
    """Inside a function."""


@dataclass(frozen=True)
class Source:
    """One parsed file."""

    path: str
    """Relative to the repository, with forward slashes."""
    tree: ast.Module

    @property
    def module(self) -> str:
        """Dotted name, `phi4.engine.step`; of an `__init__.py` that of its package."""
        name = self.path.removeprefix("kernels/").removesuffix(".py").removesuffix("/__init__")
        return name.replace("/", ".")

    @property
    def package(self) -> str:
        """First name below phi4 or phi4_kernels, `engine`; empty for the file of the top level."""
        return package_of(self.module)

    @cached_property
    def imports(self) -> tuple[Import, ...]:
        """All that the file imports. `from a import b` counts as `a.b`."""
        lazy_lines = _lazy_lines(self.tree)
        return tuple(
            Import(module, node.lineno, node.lineno in lazy_lines)
            for node in ast.walk(self.tree)
            for module in _imported(node, self)
        )


def package_of(module: str) -> str:
    """First name below the top level: `engine` of `phi4.engine.step`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


PACKAGES = ("phi4", "kernels/phi4_kernels")


def read_sources(root: Path, folders: Sequence[str] = PACKAGES) -> list[Source]:
    """Parse the files of folders under a root."""
    files = sorted(path for folder in folders for path in root.glob(f"{folder}/**/*.py"))
    return [
        Source(file.relative_to(root).as_posix(), ast.parse(file.read_text(encoding="utf-8")))
        for file in files
    ]


def resolve(imported: str, modules: Set[str]) -> str | None:
    """The file behind an import: `from package import name` is the submodule of that name, and the
    package's `__init__` where there is none. None for what is not among the modules.
    """
    while imported and imported not in modules:
        imported = imported.rpartition(".")[0]
    return imported or None


def file_graph(sources: Sequence[Source]) -> dict[str, set[str]]:
    """Which file imports which, by module name."""
    modules = {source.module for source in sources}
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for source in sources:
        targets = {resolve(found.module, modules) for found in source.imports}
        graph[source.module] |= targets - {None, source.module}
    return graph


def cycles(graph: Graph) -> list[str]:
    """One shortest cycle, `a -> b -> a`, of each group of names that reach each other."""
    reach = {name: _reachable(graph, name) for name in graph}
    found, seen = [], set()
    for name in sorted(graph):
        if name in reach[name] and name not in seen:
            seen |= {other for other in reach[name] if name in reach[other]}
            found.append(" -> ".join(_shortest_cycle(graph, name)))
    return found


def file_cycles(sources: Sequence[Source]) -> list[str]:
    """Files that import each other, as `a -> b -> a`."""
    return cycles(file_graph(sources))


def without_shortcuts(graph: Graph) -> dict[str, set[str]]:
    """The transitive reduction of a graph without cycles: the same order in the fewest arrows."""
    return {
        name: {
            target
            for target in targets
            if not any(target in _reachable(graph, other) for other in targets - {target})
        }
        for name, targets in graph.items()
    }


def _reachable(graph: Graph, start: str) -> set[str]:
    """What a name imports, directly or not; itself only where it lies on a cycle."""
    found: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting.extend(graph[name])
    return found


def _shortest_cycle(graph: Graph, start: str) -> list[str]:
    paths = [[start]]
    for path in paths:
        for target in sorted(graph[path[-1]]):
            if target == start:
                return [*path, start]
            if not any(target in other for other in paths):
                paths.append([*path, target])
    raise ValueError(f"{start} is on no cycle")


def _imported(node: ast.AST, source: Source) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = source.module.split(".")
            keep = len(package) - node.level + source.path.endswith("__init__.py")
            base = ".".join([*package[:keep], *([node.module] if node.module else [])])
        return [f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        called = node.func.id if isinstance(node.func, ast.Name) else called
        if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
            return [node.args[0].value]
    return []


def _lazy_lines(tree: ast.Module) -> set[int]:
    return {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for line in range(node.lineno, node.end_lineno + 1)
    }
