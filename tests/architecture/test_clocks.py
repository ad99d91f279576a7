"""No test asserts that something was fast: other work may share the machine."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
CLOCKS = {"monotonic", "perf_counter", "time"}
LIMITS = {"timeout", "timeout_seconds"}
REMEDY = "wait with tests.support.waiting"


def races(source: str) -> Iterator[tuple[int, str]]:
    """Line and reason of what fails on a slow machine: limits by the clock or by a number."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assert) and _is_upper_limit(node.test):
            yield node.lineno, f"asserts a limit of wall time; {REMEDY}"
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg in LIMITS and isinstance(keyword.value, ast.Constant):
                    yield node.lineno, f"{keyword.arg} is a number; {REMEDY}.LONG_SECONDS"


def _is_upper_limit(test: ast.expr) -> bool:
    for node in filter(lambda node: isinstance(node, ast.Compare), ast.walk(test)):
        sides = [any(map(_is_clock, ast.walk(side))) for side in (node.left, *node.comparators)]
        for op, left, right in zip(node.ops, sides, sides[1:], strict=False):
            if (left and isinstance(op, ast.Lt | ast.LtE)) or (
                right and isinstance(op, ast.Gt | ast.GtE)
            ):
                return True
    return False


def _is_clock(node: ast.AST) -> bool:
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name(id="time"), attr=name)):
            return name in CLOCKS
    return False


def test_no_test_races_the_clock() -> None:
    found = [
        f"{path.relative_to(TESTS.parent)}:{line}: {reason}"
        for path in sorted(TESTS.glob("**/*.py"))
        for line, reason in races(path.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "assert time.monotonic() - since < 10",
        "assert 1 <= time.monotonic() - since < LIMIT",
        "assert LIMIT > time.time() - since",
        "assert mean < 1e-3 and time.perf_counter() - begun <= 1",
        "subprocess.run(command, timeout=120)",
        "pool.run(work, timeout_seconds=60)",
    ],
)
def test_planted_race_is_found(line: str) -> None:
    assert len(list(races(line))) == 1


@pytest.mark.parametrize(
    "line",
    [
        "assert time.monotonic() - since >= 1",
        "assert time.process_time() - begun < 1",
        "subprocess.run(command, timeout=LONG_SECONDS)",
    ],
)
def test_lower_limits_and_processor_time_are_none(line: str) -> None:
    assert list(races(line)) == []
