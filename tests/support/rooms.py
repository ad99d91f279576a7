"""Where the test time goes, by room (`tests/<room>/`), and how much each room may take.

The budgets add up to what two test processes have in the ten minutes of `make test`.
"""

from collections import Counter

import pytest

BUDGET_SECONDS = {
    "architecture": 80,
    "cli": 150,
    "config": 40,
    "csrc": 200,
    "convert": 120,
    "data": 300,
    "engine": 700,
    "golden": 40,
    "kernels": 600,
    "launch": 150,
    "model": 40,
    "plan": 60,
    "rundir": 20,
    "stages": 40,
    "support": 120,
    "track": 120,
    "train": 90,
    "verify": 240,
}


class RoomSeconds:
    """Pytest plugin that prints the seconds per room.

    Args:
        strict: whether a room over its budget fails the run.
    """

    def __init__(self, strict: bool) -> None:
        self._strict = strict
        self._seconds: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add up set-up, call and tear-down."""
        self._seconds[report.nodeid.split("/")[1]] += report.duration

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fail a strict run whose rooms took too long."""
        if self._strict and self._over() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """The table."""
        terminalreporter.section("seconds per room")
        for room, seconds in self._seconds.most_common():
            mark = "  OVER BUDGET" if room in self._over() else ""
            budget = BUDGET_SECONDS.get(room, 0)
            terminalreporter.write_line(f"{room:<14} {seconds:6.1f} of {budget:4d} s{mark}")

    def _over(self) -> list[str]:
        return [r for r, seconds in self._seconds.items() if seconds > BUDGET_SECONDS.get(r, 0)]
