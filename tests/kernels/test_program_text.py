"""Which changes to a file change its program text."""

import ast

import pytest
from phi4_kernels import registry
from phi4_kernels.program_text import program_text

SOURCE = '''"""About."""

import math  # for pi

SIZE = 4
"""Bytes."""


def area(r):
    """Of a circle.

    r: its radius
    """
    # pi r^2
    return math.pi * r * r


TEXT = """a # no comment

b"""
'''
PROGRAM = '''import math
SIZE = 4
def area(r):
    return math.pi * r * r
TEXT = """a # no comment

b"""'''


def test_comments_and_docstrings_are_left_out() -> None:
    assert program_text(SOURCE) == PROGRAM


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Of a circle", "Of a disc"),
        ("# pi r^2", "# the square of r, times pi\n    # (Archimedes)"),
        ("  # for pi", ""),
        ('"""Bytes."""', '"""Bytes, größer."""  # in é'),
    ],
)
def test_what_explains_changes_nothing(old: str, new: str) -> None:
    assert program_text(SOURCE.replace(old, new)) == PROGRAM


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("SIZE = 4", "SIZE = 5"),
        ("    return", "    r += 1\n    return"),
        ("# no comment", "# another"),
        ("comment\n\nb", "comment\nb"),
        ("import math  # for pi", "# import math"),
    ],
)
def test_what_is_computed_counts(old: str, new: str) -> None:
    assert program_text(SOURCE.replace(old, new)) != PROGRAM


def test_a_body_of_dots_is_kept() -> None:
    stub = "def area(r): ..."
    assert program_text(stub + "  # a stub") == stub


def _is_docstring(node: ast.AST) -> bool:
    match node:
        case ast.Expr(value=ast.Constant(value=str())):
            return True
    return False


def _without_docstrings(tree: ast.Module) -> str:
    for node in ast.walk(tree):
        if isinstance(getattr(node, "body", None), list):
            node.body = [child for child in node.body if not _is_docstring(child)]
    return ast.dump(tree)


@pytest.mark.parametrize("op", registry.OPS)
def test_every_shipped_file_keeps_its_program(op: str) -> None:
    for path in sorted(registry.folder(op).rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        kept = ast.parse(program_text(source))
        assert ast.dump(kept) == _without_docstrings(ast.parse(source)), path.name
