"""A file with a kernel says what it computes: formulas and reasons in over 4% of its lines."""

import ast
from pathlib import Path

import pytest

from tests.architecture.sizes import ROOT

LEAST_SHARE = 0.04
"""Lines that are a comment and nothing else, of all lines."""


def has_kernel(source: str) -> bool:
    """Whether a function is compiled by Triton or Gluon."""
    decorators = (
        ast.unparse(decorator)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
        for decorator in node.decorator_list
    )
    return any(text.startswith(("triton.jit", "gluon.jit")) for text in decorators)


def without_reasons(root: Path) -> list[str]:
    """A line per file with a kernel and too few comments."""
    found = []
    for path in sorted((root / "kernels").glob("**/*.py")):
        source = path.read_text(encoding="utf-8")
        lines = source.splitlines()
        comments = sum(line.lstrip().startswith("#") for line in lines)
        if has_kernel(source) and comments <= LEAST_SHARE * len(lines):
            found.append(f"{path.relative_to(root)}: {comments} comments on {len(lines)} lines")
    return found


def test_kernels_say_what_they_compute() -> None:
    assert without_reasons(ROOT) == [], "put the formula, or the reason, above the line"


@pytest.mark.parametrize(
    ("decorator", "num_comments", "found"),
    [
        ("@triton.jit", 4, ["kernels/k.py: 4 comments on 100 lines"]),
        ("@triton.jit(do_not_specialize=['n'])", 4, ["kernels/k.py: 4 comments on 100 lines"]),
        ("@gluon.jit", 0, ["kernels/k.py: 0 comments on 100 lines"]),
        ("@triton.jit", 5, []),
        ("@cache", 0, []),
    ],
)
def test_planted_file_is_found(
    tmp_path: Path, decorator: str, num_comments: int, found: list[str]
) -> None:
    (tmp_path / "kernels").mkdir()
    body = ["    # y = 2 x"] * num_comments + ["    y = 2 * x"] * (98 - num_comments)
    lines = [decorator, "def kernel(x):", *body]
    (tmp_path / "kernels" / "k.py").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert without_reasons(tmp_path) == found
