"""The part of a Python file that determines what it computes: no comments, no docstrings.

A correctness row from a GPU belongs to a program. Editing comments or docstrings does not change
the program, so the row must stay valid. The text is compared, not the syntax tree, whose form
differs between versions of Python.
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

    def place(line: int | None, offset: int | None) -> _Place:
        # Nodes of parsed text have an end. ast counts bytes.
        assert line is not None
        return line, len(lines[line - 1].encode()[:offset].decode())

    return [
        (place(text.lineno, text.col_offset), place(text.end_lineno, text.end_col_offset))
        for text in _docstring_nodes(tree)
    ]


def _docstring_nodes(tree: ast.Module) -> list[ast.Constant]:
    """Strings that are statements."""
    values = (node.value for node in ast.walk(tree) if isinstance(node, ast.Expr))
    return [
        value
        for value in values
        if isinstance(value, ast.Constant) and isinstance(value.value, str)
    ]


def _lines_of_strings(tree: ast.Module) -> set[int]:
    """Lines of strings of several lines that are no docstrings."""
    docstrings = {id(node) for node in _docstring_nodes(tree)}
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr | ast.Constant) and id(node) not in docstrings:
            end = node.end_lineno or node.lineno
            if end > node.lineno:
                found.update(range(node.lineno, end + 1))
    return found
