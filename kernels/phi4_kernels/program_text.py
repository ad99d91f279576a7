"""What of a Python file decides what it computes: its text without comments and docstrings.

A proof on a GPU belongs to a program. To explain a line better does not change the program, so it
must not cost the proof. The text is compared, not the syntax tree, whose form differs between
versions of Python.
"""

import ast
import io
import tokenize
from functools import cache

_Place = tuple[int, int]
"""Line, from 1, and column in characters."""


@cache
def program_text(source: str) -> str:
    """The source without comments, docstrings and empty lines.

    Raises:
        SyntaxError: the source is not Python.
    """
    tree, lines = ast.parse(source), source.splitlines()
    spans = [*_comments(source), *_docstrings(tree, lines)]
    for (first, start), (last, end) in sorted(spans, reverse=True):
        kept = lines[first - 1][:start] + lines[last - 1][end:]
        lines[first - 1 : last] = [kept, *[""] * (last - first)]
    # An empty line within a string is part of the program.
    in_string = _lines_of_strings(tree)
    return "\n".join(
        line.rstrip() for i, line in enumerate(lines, 1) if line.strip() or i in in_string
    )


def _comments(source: str) -> list[tuple[_Place, _Place]]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [(token.start, token.end) for token in tokens if token.type == tokenize.COMMENT]


def _docstrings(tree: ast.Module, lines: list[str]) -> list[tuple[_Place, _Place]]:
    """Of modules, classes and functions, and the strings under an attribute or constant."""

    def place(line: int, offset: int) -> _Place:
        # ast counts bytes.
        return line, len(lines[line - 1].encode()[:offset].decode())

    return [
        (place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset))
        for node in ast.walk(tree)
        if _is_docstring(node)
    ]


def _is_docstring(node: ast.AST) -> bool:
    is_constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_constant and isinstance(node.value.value, str)


def _lines_of_strings(tree: ast.Module) -> set[int]:
    """Lines of strings of several lines that are no docstrings."""
    docstrings = {id(node.value) for node in ast.walk(tree) if _is_docstring(node)}
    found: set[int] = set()
    for node in ast.walk(tree):
        is_string = isinstance(node, ast.JoinedStr | ast.Constant)
        if is_string and node.end_lineno > node.lineno and id(node) not in docstrings:
            found.update(range(node.lineno, node.end_lineno + 1))
    return found
