"""Files and functions stay readable in one sitting; the ten largest are printed."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
FILE_LINES = 500
FUNCTION_LINES = {"phi4": 80, "kernels": 80, "tools": 80, "tests": 120}
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
    for room, limit in FUNCTION_LINES.items():
        for path in sorted((root / room).glob("**/*.py")):
            text = path.read_text(encoding="utf-8")
            name = path.relative_to(root).as_posix()
            files.append(Size(text.count("\n"), FILE_LINES, name))
            functions += [
                Size(node.end_lineno - node.lineno + 1, limit_of(node, limit), f"{name} {label}")
                for node, label in walk(ast.parse(text))
            ]
    return sorted(files, reverse=True), sorted(functions, reverse=True)


def walk(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, f"{node.name}()"


def limit_of(node: ast.FunctionDef | ast.AsyncFunctionDef, limit: int) -> int:
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    return KERNEL_LINES if any("triton.jit" in text for text in decorators) else limit


def too_large(measured: list[Size]) -> list[str]:
    return [f"{s.name}: {s.num_lines} lines of {s.limit}" for s in measured if s[0] > s.limit]


def table(measured: list[Size]) -> str:
    return "\n".join(f"{size.num_lines:5d}  {size.name}" for size in measured[:10])


def test_no_file_or_function_is_too_large(capsys: pytest.CaptureFixture[str]) -> None:
    files, functions = sizes(ROOT)
    with capsys.disabled():
        print(f"\nlargest files\n{table(files)}\nlargest functions\n{table(functions)}")
    assert too_large(files) + too_large(functions) == []


def planted(root: Path, path: str, text: str) -> list[str]:
    (root / path).parent.mkdir(parents=True)
    (root / path).write_text(text, encoding="utf-8")
    files, functions = sizes(root)
    return too_large(files) + too_large(functions)


def function_of(num_lines: int, decorator: str = "") -> str:
    return f"{decorator}def f():\n" + "    x = 1\n" * (num_lines - 1)


@pytest.mark.parametrize(
    ("path", "text", "found"),
    [
        ("phi4/a.py", "x = 1\n" * 500, []),
        ("phi4/a.py", "x = 1\n" * 501, ["phi4/a.py: 501 lines of 500"]),
        ("phi4/a.py", function_of(80), []),
        ("phi4/a.py", function_of(81), ["phi4/a.py f(): 81 lines of 80"]),
        ("tools/b/a.py", function_of(81), ["tools/b/a.py f(): 81 lines of 80"]),
        ("tests/a.py", function_of(120), []),
        ("tests/a.py", function_of(121), ["tests/a.py f(): 121 lines of 120"]),
        ("kernels/k/a.py", function_of(120, "@triton.jit\n"), []),
        (
            "kernels/k/a.py",
            function_of(121, "@triton.jit\n"),
            ["kernels/k/a.py f(): 121 lines of 120"],
        ),
    ],
)
def test_planted_size_is_found(tmp_path: Path, path: str, text: str, found: list[str]) -> None:
    assert planted(tmp_path, path, text) == found
