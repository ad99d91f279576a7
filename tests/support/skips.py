"""Strict skips: a skip or an expected failure that tests/skips.txt does not list fails the test.

Without this a broken guard turns a test off and the run stays green.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest


@dataclass(frozen=True)
class AllowedSkip:
    """One line of the list: globs of the node id and of the reason."""

    node_id: str
    reason: str


def read_skip_list(path: Path) -> tuple[AllowedSkip, ...]:
    """Read `node id glob | reason glob` lines; `#` starts a comment line.

    Raises:
        ValueError: a line has no `|`, or an empty side.
    """
    allowed = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        node_id, _, reason = (part.strip() for part in line.partition("|"))
        if not node_id or not reason:
            raise ValueError(f"{path}:{number}: {line!r}; write: node id glob | reason glob")
        allowed.append(AllowedSkip(node_id, reason))
    return tuple(allowed)


class StrictSkips:
    """Pytest plugin that turns unlisted skips into failures."""

    def __init__(self, allowed: tuple[AllowedSkip, ...]) -> None:
        self._allowed = allowed

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Iterator[None]:
        """A test that skips, or fails as expected."""
        report = yield
        return self._judged(report)

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self) -> Iterator[None]:
        """A module that skips itself."""
        report = yield
        return self._judged(report)

    def _judged(
        self, report: pytest.TestReport | pytest.CollectReport
    ) -> pytest.TestReport | pytest.CollectReport:
        if not report.skipped:
            return report
        reason = _reason(report)
        if any(
            fnmatchcase(report.nodeid, allowed.node_id) and fnmatchcase(reason, allowed.reason)
            for allowed in self._allowed
        ):
            return report
        report.outcome = "failed"
        report.longrepr = f"skipped, and not on the list of tests/skips.txt: {reason}"
        # Else pytest reports an expected failure whatever the outcome says.
        if hasattr(report, "wasxfail"):
            del report.wasxfail
        return report


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    if hasattr(report, "wasxfail"):
        return f"expected to fail: {report.wasxfail}"
    return report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
