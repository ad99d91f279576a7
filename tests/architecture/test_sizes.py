"""Files and functions stay readable in one sitting. `make test` prints the ten largest."""

from pathlib import Path

import pytest

from tests.architecture.sizes import (
    NINTH_DECILE_LINES,
    ROOT,
    decile,
    largest,
    sizes,
    too_large,
)


def test_no_file_or_function_is_too_large() -> None:
    files, functions = sizes(ROOT)
    assert too_large(files) + too_large(functions) == [], largest(ROOT)


def test_most_functions_of_phi4_are_short() -> None:
    _, functions = sizes(ROOT)
    assert 0 < decile(functions, "phi4") <= NINTH_DECILE_LINES


@pytest.mark.parametrize(("num_long", "lines"), [(1, 2), (2, 30)])
def test_tenth_of_the_functions_may_be_long(tmp_path: Path, num_long: int, lines: int) -> None:
    (tmp_path / "phi4").mkdir()
    functions = [function_of(30)] * num_long + [function_of(2)] * (10 - num_long)
    (tmp_path / "phi4" / "a.py").write_text("".join(functions), encoding="utf-8")
    assert decile(sizes(tmp_path)[1], "phi4") == lines


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
