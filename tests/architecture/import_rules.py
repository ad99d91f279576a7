"""Who may import whom, read from the syntax trees: nothing is imported to be checked.

Imports inside functions and under TYPE_CHECKING count: a cycle dodged is a cycle.
"""

import ast
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

LAYERS = (
    ("__main__",),
    ("cli",),
    ("verify", "launch"),
    ("stages", "pts", "convert", "plan"),
    ("train",),
    ("engine", "track"),
    ("rundir",),
    ("data", "model"),
    ("config",),
    ("errors",),
)
"""Rooms of phi4/, top to bottom. A room imports rooms of lower layers only."""

KERNEL_USERS = ("engine", "verify", "cli")
"""Rooms that may import phi4_kernels."""

ONLY_IN = {
    "megatron": "phi4/engine/",
    "transformer_engine": "phi4/engine/",
    "mlflow": "phi4/track/mlflow.py",
    "transformers": "phi4/convert/",
}
"""Third parties that one place owns."""

KERNEL_PACKAGES = {"phi4_kernels", "torch", "triton", "numpy"} | set(sys.stdlib_module_names)
KERNEL_PROVIDERS = "kernels/phi4_kernels/bench/providers/"
"""Competitors in the bench: any third party, but imported when asked for only."""

RANK_FREE = ("phi4/data/", "phi4/rundir/", "phi4/track/", "phi4/model/")
"""Rooms that are handed plain values and know no process group."""

TORCH_FREE = ("phi4/rundir/", "phi4/launch/")

ENVIRONMENT_READERS = (
    "phi4/launch/",
    "phi4/engine/platform.py",
    "phi4/data/vocabulary/tokenizer.py",
    "kernels/phi4_kernels/dispatch.py",
    "kernels/phi4_kernels/testing/",
)
_ENVIRONMENT_NAMES = {"environ", "environb", "getenv", "putenv", "unsetenv"}


@dataclass(frozen=True)
class Source:
    """One parsed file."""

    path: str
    """Relative to the repository, with forward slashes."""
    tree: ast.Module

    @property
    def module(self) -> str:
        """Dotted name, `phi4.engine.step`."""
        name = self.path.removeprefix("kernels/").removesuffix(".py").removesuffix("/__init__")
        return name.replace("/", ".")

    @property
    def room(self) -> str:
        """First name below the package, `engine`; empty for the package itself."""
        return _room(self.module)


@dataclass(frozen=True)
class Import:
    """One imported module, and where."""

    module: str
    line: int
    lazy: bool
    """Inside a function."""


def read_sources(root: Path) -> list[Source]:
    """Parse phi4/ and kernels/phi4_kernels/ under a root."""
    files = sorted([*root.glob("phi4/**/*.py"), *root.glob("kernels/phi4_kernels/**/*.py")])
    return [
        Source(file.relative_to(root).as_posix(), ast.parse(file.read_text(encoding="utf-8")))
        for file in files
    ]


def violations(root: Path) -> list[str]:
    """Every broken rule as `path:line: what`; empty for a sound tree."""
    return [
        f"{source.path}:{line}: {text}"
        for source in read_sources(root)
        for rule in RULES
        for line, text in rule(source)
    ]


def imports(source: Source) -> Iterator[Import]:
    """All modules that a file imports. `from a import b` counts as `a.b`."""
    lazy_lines = _lazy_lines(source.tree)
    for node in ast.walk(source.tree):
        for module in _imported(node, source):
            yield Import(module, node.lineno, node.lineno in lazy_lines)


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


def _room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def _depth(room: str) -> int | None:
    return next((depth for depth, rooms in enumerate(LAYERS) if room in rooms), None)


def layers(source: Source) -> Iterator[tuple[int, str]]:
    """A room of phi4 imports lower layers only."""
    if source.module.split(".")[0] != "phi4":
        return
    depth = _depth(source.room)
    if depth is None and source.room:
        yield 1, f"room {source.room!r} has no layer; give it one in LAYERS"
        return
    for found in imports(source):
        # `from phi4 import __version__` is no room.
        room = _room(found.module)
        if found.module.split(".")[0] != "phi4" or room in ("", "__version__"):
            continue
        if room == source.room:
            continue
        below = _depth(room)
        if below is None:
            yield found.line, f"imports {found.module}, a room without a layer"
        elif depth is None or below <= depth:
            yield found.line, f"{source.room or 'phi4'} may not import {room}: not a lower layer"


def kernel_users(source: Source) -> Iterator[tuple[int, str]]:
    """Only the engine, the proofs and the command line import phi4_kernels."""
    if source.path.startswith("phi4/") and source.room not in KERNEL_USERS:
        for found in imports(source):
            if found.module.split(".")[0] == "phi4_kernels":
                yield found.line, f"{source.room} may not import phi4_kernels"


def kernels_stand_alone(source: Source) -> Iterator[tuple[int, str]]:
    """phi4_kernels imports torch, triton, numpy and the standard library."""
    if not source.path.startswith("kernels/"):
        return
    provider = source.path.startswith(KERNEL_PROVIDERS)
    for found in imports(source):
        package = found.module.split(".")[0]
        if package in KERNEL_PACKAGES:
            continue
        if package == "phi4" or not provider:
            yield found.line, f"phi4_kernels may not import {package}"
        elif not found.lazy:
            yield found.line, f"a bench provider imports {package} inside a function only"


def owned_packages(source: Source) -> Iterator[tuple[int, str]]:
    """Some third parties have one owner."""
    if not source.path.startswith("phi4/"):
        return
    for found in imports(source):
        owner = ONLY_IN.get(found.module.split(".")[0])
        if owner and not source.path.startswith(owner):
            yield found.line, f"{found.module.split('.')[0]} is imported in {owner} only"


def rank_free_rooms(source: Source) -> Iterator[tuple[int, str]]:
    """data, track and model know no ranks, and no triton_impl.py communicates."""
    triton = source.path.endswith("/triton_impl.py")
    if not triton and not source.path.startswith(RANK_FREE):
        return
    who = "triton_impl.py" if triton else source.room
    for found in imports(source):
        if found.module.startswith("torch.distributed"):
            yield found.line, f"{who} may not use torch.distributed"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield node.lineno, f"{who} may not use torch.distributed"


def torch_free_rooms(source: Source) -> Iterator[tuple[int, str]]:
    """A launcher and the run directory start in milliseconds, so without torch."""
    if source.path.startswith(TORCH_FREE):
        for found in imports(source):
            if found.module.split(".")[0] == "torch":
                yield found.line, f"{source.room} may not import torch"


def environment(source: Source) -> Iterator[tuple[int, str]]:
    """os.environ has few readers."""
    if source.path.startswith(ENVIRONMENT_READERS):
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and node.attr in _ENVIRONMENT_NAMES:
            if isinstance(node.value, ast.Name) and node.value.id == "os":
                yield node.lineno, f"os.{node.attr} is read in a few files only"
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            for name in sorted({alias.name for alias in node.names} & _ENVIRONMENT_NAMES):
                yield node.lineno, f"os.{name} is read in a few files only"


Rule = Callable[[Source], Iterator[tuple[int, str]]]
RULES: tuple[Rule, ...] = (
    layers,
    kernel_users,
    kernels_stand_alone,
    owned_packages,
    rank_free_rooms,
    torch_free_rooms,
    environment,
)
