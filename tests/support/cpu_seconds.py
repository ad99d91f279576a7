"""CPU seconds of every test, added up per package (`tests/<package>/`) and held against budgets.

CPU time, not wall time, so that other work on the machine does not count. The seconds of a test
include its fixtures and the processes it started, whether they have ended or still run. They are
seconds of a reference processor: a fixed loop that runs between the tests tells how much slower
this one is, for a shared core takes up to twice as long for the same work.

Memory and caches that other programs use slow tests down in ways that the loop does not see. So a
package is held to its budget by the seconds that `make durations` recorded, and a run marks what is
over; it fails only where all packages together are far over.
"""

import json
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.support.process_tree import child_seconds

ROOT = Path(__file__).parents[2]
BUDGETS = ROOT / "tests" / "cpu_budgets.toml"
MEASURED = ROOT / "tests" / "cpu_seconds.json"

FAILING_FACTOR = 1.5
"""A strict run fails beyond this multiple of all budgets, as the probe predicts only roughly."""

COLLECTION = "(collection)"
"""Stands for a package: what the test processes spend on importing the tests."""

REFERENCE_SECONDS = 0.0126
"""What `probe` takes on an AMD EPYC core of 2.6 GHz that nothing else uses."""
_PROBE_STEPS = 300_000
_SECONDS_BETWEEN_PROBES = 2.0

_SCAN_SECONDS = 0.1
_NUM_SLOWEST = 10


def probe() -> float:
    """CPU seconds of a fixed piece of work."""
    begin, total = time.process_time(), 0
    for number in range(_PROBE_STEPS):
        total += number * number
    return time.process_time() - begin


class ProcessTreeClock:
    """CPU seconds of this process and its descendants, in laps."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._own_seconds = time.process_time()
        self._child_seconds = child_seconds(self._process)
        self._scanned_at = time.monotonic()

    def lap(self) -> float:
        """CPU seconds since the previous lap.

        A scan of the process table takes milliseconds, so a lap shorter than _SCAN_SECONDS leaves
        the children's time to a later one.
        """
        own_seconds = time.process_time()
        spent = own_seconds - self._own_seconds
        self._own_seconds = own_seconds
        now = time.monotonic()
        if now - self._scanned_at >= _SCAN_SECONDS:
            seconds = child_seconds(self._process)
            spent += max(0.0, seconds - self._child_seconds)
            self._child_seconds, self._scanned_at = seconds, now
        return spent


@dataclass(frozen=True)
class Budgets:
    """What a selection of tests may cost and what its files cost when last measured.

    Attributes:
        packages: CPU seconds by package.
        files: CPU seconds by test file, and of the collection.
    """

    packages: Mapping[str, float]
    files: Mapping[str, float]

    @classmethod
    def of(cls, selection: str) -> "Budgets":
        """Read those of a selection: the name of the make target that runs it."""
        packages = tomllib.loads(BUDGETS.read_text(encoding="utf-8"))[selection]
        files = json.loads(MEASURED.read_text(encoding="utf-8")).get(selection, {})
        return cls(packages, files)

    def recorded_per_package(self) -> Counter[str]:
        """CPU seconds by package when last measured."""
        seconds: Counter[str] = Counter()
        for file, spent in self.files.items():
            seconds[_package_of(file)] += spent
        return seconds


class CpuMeter:
    """Pytest plugin of a process that runs tests: notes the CPU seconds in every report.

    They are divided by how much slower than the reference processor this one was lately.
    """

    def __init__(self) -> None:
        self._clock = ProcessTreeClock()
        self._slowdown = 1.0
        self._unprobed_seconds = float("inf")

    def slowdown(self, seconds: float) -> float:
        """How much slower this processor is than the reference; probed now and then.

        Args:
            seconds: that were spent since the last call.
        """
        self._unprobed_seconds += seconds
        if self._unprobed_seconds > _SECONDS_BETWEEN_PROBES:
            self._slowdown = max(1.0, probe() / REFERENCE_SECONDS)
            self._unprobed_seconds = 0.0
            self._clock.lap()
        return self._slowdown

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """What came before the first test."""
        seconds = time.process_time()
        self._clock.lap()
        seconds /= self.slowdown(0.0)
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["collection_cpu_seconds"] = seconds

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self) -> Iterator[None]:
        """A phase of a test is over: set-up, call or tear-down. The report travels to xdist."""
        report = yield
        seconds = self._clock.lap()
        report.cpu_seconds = seconds / self.slowdown(seconds)
        return report


class LongestFirst:
    """Pytest plugin that runs the most expensive files first, so that two workers end together."""

    def __init__(self, budgets: Budgets) -> None:
        self._files = budgets.files

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Order files; the tests of a file keep their order. A file never measured comes first."""
        items.sort(key=lambda item: -self._files.get(_file_of(item.nodeid), float("inf")))


class CpuReport:
    """Pytest plugin of the process that reports: the table, and the verdict of a strict run.

    Args:
        budgets: of the selection that runs.
        strict: whether a run far over its budgets fails.
    """

    def __init__(self, budgets: Budgets, strict: bool) -> None:
        self._budgets = budgets.packages
        self._strict = strict
        self._tests: Counter[str] = Counter()
        self._collection_seconds = 0.0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add up the phases. The report of a crashed worker has no time."""
        self._tests[report.nodeid] += getattr(report, "cpu_seconds", 0.0)

    def pytest_collection_finish(self) -> None:
        """The tests run in this process, without xdist."""
        self._collection_seconds = time.process_time()

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: object) -> None:
        """An xdist worker has ended."""
        output = getattr(node, "workeroutput", {})
        self._collection_seconds += output.get("collection_cpu_seconds", 0.0)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fail a strict run that took far too much, or has a package without a budget."""
        fails = self._far_over() or self.seconds_per_package().keys() - self._budgets.keys()
        if self._strict and fails and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """The table."""
        seconds = self.seconds_per_package()
        terminalreporter.section("CPU seconds per package, children included")
        for package, spent in seconds.most_common():
            budget = self._budgets.get(package, 0)
            mark = "  over its budget" if spent > budget else ""
            terminalreporter.write_line(f"{package:<14} {spent:6.1f} of {budget:5.0f} s{mark}")
        mark = f"  TOO MUCH: over {FAILING_FACTOR:g} x" if self._far_over() else ""
        terminalreporter.write_line(
            f"{'total':<14} {seconds.total():6.1f} of {sum(self._budgets.values()):5.0f} s{mark}"
        )
        terminalreporter.section(f"the {_NUM_SLOWEST} tests that took most CPU seconds")
        for name, spent in self._tests.most_common(_NUM_SLOWEST):
            terminalreporter.write_line(f"{spent:6.1f} s  {name}")

    def seconds_per_test(self) -> Mapping[str, float]:
        """CPU seconds by node id: set-up, call and tear-down."""
        return self._tests

    def seconds_per_package(self) -> Counter[str]:
        """CPU seconds by package, the collection included."""
        seconds: Counter[str] = Counter({COLLECTION: self._collection_seconds})
        for name, spent in self._tests.items():
            seconds[_package_of(name)] += spent
        return seconds

    def seconds_per_file(self) -> dict[str, float]:
        """CPU seconds by test file and of the collection, in the order of their names."""
        seconds: Counter[str] = Counter({COLLECTION: self._collection_seconds})
        for name, spent in self._tests.items():
            seconds[_file_of(name)] += spent
        return {file: round(seconds[file], 1) for file in sorted(seconds)}

    def _far_over(self) -> bool:
        allowed = FAILING_FACTOR * sum(self._budgets.values())
        return self.seconds_per_package().total() > allowed


class WriteMeasured:
    """Pytest plugin of `make durations`: records what the files of a selection cost."""

    def __init__(self, report: CpuReport, selection: str) -> None:
        self._report = report
        self._selection = selection

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Replace the entries of the files that ran, unless tests failed; drop files that went."""
        if session.exitstatus != pytest.ExitCode.OK:
            return
        measured = json.loads(MEASURED.read_text(encoding="utf-8"))
        known = measured.get(self._selection, {}) | self._report.seconds_per_file()
        measured[self._selection] = {
            file: known[file] for file in known if file == COLLECTION or (ROOT / file).exists()
        }
        MEASURED.write_text(json.dumps(measured, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _package_of(nodeid: str) -> str:
    """`train` for tests/train/... at any depth; what is no file stands for itself."""
    *folders, name = Path(_file_of(nodeid)).parts
    return (folders[1:] or folders or [name])[0]


def _file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0]
