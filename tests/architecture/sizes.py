"""How long files and functions are, read from the syntax trees, and how long they may be."""

import ast
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
FILE_LINES = 500
FUNCTION_LINES = {"phi4": 80, "kernels": 80, "tools": 80, "tests": 120}
NINTH_DECILE_LINES = 25
"""Nine in ten functions of phi4 have at most as many."""
KERNEL_LINES = 120
"""A @triton.jit function."""


class Size(NamedTuple):
    """Lines of a file or a function, and how many it may have."""

    num_lines: int
    limit: int
    name: str


def sizes(root: Path) -> tuple[list[Size], list[Size]]:
    """Sizes of all files and of all functions under a root, largest first."""
    files, functions = [], []
    for folder, limit in FUNCTION_LINES.items():
        for path in sorted((root / folder).glob("**/*.py")):
            text = path.read_text(encoding="utf-8")
            name = path.relative_to(root).as_posix()
            files.append(Size(text.count("\n"), FILE_LINES, name))
            functions += [
                Size(node.end_lineno - node.lineno + 1, _limit_of(node, limit), f"{name} {label}")
                for node, label in _functions(ast.parse(text))
            ]
    return sorted(files, reverse=True), sorted(functions, reverse=True)


def _functions(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, f"{node.name}()"


def _limit_of(node: ast.FunctionDef | ast.AsyncFunctionDef, limit: int) -> int:
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    return KERNEL_LINES if any("triton.jit" in text for text in decorators) else limit


def decile(measured: list[Size], folder: str) -> int:
    """Lines that nine in ten of a folder's functions do not exceed."""
    lines = sorted(size.num_lines for size in measured if size.name.startswith(f"{folder}/"))
    return lines[math.ceil(0.9 * len(lines)) - 1] if lines else 0


def too_large(measured: list[Size]) -> list[str]:
    """One line per file or function beyond its limit."""
    return [f"{s.name}: {s.num_lines} lines of {s.limit}" for s in measured if s[0] > s.limit]


def largest(root: Path) -> str:
    """The ten largest files and functions, a line each."""
    return "\n".join(
        f"{size.num_lines:5d}  {size.name}" for measured in sizes(root) for size in measured[:10]
    )
