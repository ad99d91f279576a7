"""CPU seconds are counted wherever they are spent, and held to budgets once recorded."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support import cpu_seconds
from tests.support.cpu_seconds import (
    COLLECTION,
    Budgets,
    CpuMeter,
    CpuReport,
    LongestFirst,
    WriteMeasured,
)

pytest_plugins = ["pytester"]

TESTS = Path(__file__).parents[1]

WORKLOADS = """
import subprocess, sys, time
import pytest

WORK = "import time\\nend = time.process_time() + 0.3\\nwhile time.process_time() < end: pass\\n"

@pytest.fixture
def costly(): exec(WORK)

def test_set_up(costly): pass
def test_call(): exec(WORK)
def test_ended_child(): subprocess.run([sys.executable, "-S", "-c", WORK], check=True)

def test_living_child():
    global child
    code = WORK + "print('done', flush=True)\\ntime.sleep(1000)"
    child = subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE)
    child.stdout.readline()

def test_sleep(): time.sleep(0.3)

def test_end_of_the_child():
    child.kill()
    child.wait()
    time.sleep(0.2)
"""


def report_of(strict: bool = True, **packages: float) -> CpuReport:
    return CpuReport(Budgets(packages, {}), strict)


def finished(report: CpuReport, **spent: float) -> pytest.ExitCode:
    """Exit code of a green run whose packages took so many CPU seconds."""
    for package, seconds in spent.items():
        nodeid = f"tests/{package}/test_a.py::test_b"
        report.pytest_runtest_logreport(SimpleNamespace(nodeid=nodeid, cpu_seconds=seconds))
    session = SimpleNamespace(exitstatus=pytest.ExitCode.OK)
    report.pytest_sessionfinish(session)
    return session.exitstatus


def probe_takes(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    monkeypatch.setattr(cpu_seconds, "probe", lambda: factor * cpu_seconds.REFERENCE_SECONDS)


@pytest.mark.parametrize(("factor", "slowdown"), [(2.0, 2.0), (0.5, 1.0)])
def test_a_slower_processor_counts_for_less_and_a_faster_one_for_no_more(
    monkeypatch: pytest.MonkeyPatch, factor: float, slowdown: float
) -> None:
    meter = CpuMeter()
    probe_takes(monkeypatch, factor)
    assert meter.slowdown(0.1) == slowdown
    # The next probe is due when enough was spent.
    probe_takes(monkeypatch, 3.0)
    assert meter.slowdown(0.1) == slowdown
    assert meter.slowdown(5.0) == 3.0


def test_seconds_belong_to_the_test_that_spent_them(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe_takes(monkeypatch, 1.0)
    pytester.makepyfile(test_it=WORKLOADS)
    report = report_of(strict=False)
    result = pytester.inline_run("-p", "no:cacheprovider", plugins=[CpuMeter(), report])
    assert result.ret == pytest.ExitCode.OK
    seconds = {name.partition("::")[2]: spent for name, spent in report.seconds_per_test().items()}
    for name in ("test_set_up", "test_call", "test_ended_child", "test_living_child"):
        assert 0.28 < seconds[name] < 0.6, seconds
    assert seconds["test_sleep"] < 0.2 and seconds["test_end_of_the_child"] < 0.2, seconds


def test_seconds_travel_from_worker_to_controller() -> None:
    report = pytest.TestReport("a/b.py::c", ("b.py", 0, "c"), {}, "passed", None, "call")
    report.cpu_seconds = 1.5
    data = json.loads(json.dumps(report._to_json()))
    assert pytest.TestReport._from_json(data).cpu_seconds == 1.5


@pytest.mark.parametrize(
    ("seconds", "strict", "code"),
    [
        ({"data": 29.9}, True, pytest.ExitCode.OK),
        ({"data": 30.1}, True, pytest.ExitCode.TESTS_FAILED),
        ({"data": 20.0, "train": 10.1}, True, pytest.ExitCode.TESTS_FAILED),
        ({"data": 30.1}, False, pytest.ExitCode.OK),
    ],
)
def test_strict_run_fails_far_over_all_budgets(
    seconds: dict[str, float], strict: bool, code: pytest.ExitCode
) -> None:
    assert finished(report_of(strict, data=10, train=10, **{COLLECTION: 0}), **seconds) == code


def test_package_without_a_budget_fails_a_strict_run() -> None:
    assert finished(report_of(data=10), other=0.1) == pytest.ExitCode.TESTS_FAILED


def test_expensive_and_unknown_files_come_first() -> None:
    budgets = Budgets({}, {"tests/a.py": 1.0, "tests/b.py": 5.0})
    names = ["tests/a.py::1", "tests/b.py::2", "tests/b.py::1", "tests/new.py::1"]
    items = [SimpleNamespace(nodeid=name) for name in names]
    LongestFirst(budgets).pytest_collection_modifyitems(items)
    assert [item.nodeid for item in items] == [names[3], names[1], names[2], names[0]]


def test_measured_seconds_replace_those_of_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cpu_seconds.json"
    before = {"tests/gone.py": 1.0, "tests/conftest.py": 4.0, "tests/support/skips.py": 5.0}
    path.write_text(json.dumps({"test": before, "test-all": {"tests/x.py": 2.0}}))
    monkeypatch.setattr(cpu_seconds, "MEASURED", path)
    report = report_of(support=10)
    spent = SimpleNamespace(nodeid="tests/support/skips.py::test_b", cpu_seconds=3.0)
    report.pytest_runtest_logreport(spent)
    for status in (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.OK):
        assert json.loads(path.read_text())["test"] == before
        WriteMeasured(report, "test").pytest_sessionfinish(SimpleNamespace(exitstatus=status))
    assert json.loads(path.read_text()) == {
        "test": {COLLECTION: 0.0, "tests/conftest.py": 4.0, "tests/support/skips.py": 3.0},
        "test-all": {"tests/x.py": 2.0},
    }


@pytest.mark.parametrize("selection", ["test", "test-all"])
def test_every_package_has_a_budget(selection: str) -> None:
    packages = {path.relative_to(TESTS).parts[0] for path in TESTS.rglob("test_*.py")}
    assert packages | {COLLECTION} == Budgets.of(selection).packages.keys()


@pytest.mark.parametrize("selection", ["test", "test-all"])
def test_recorded_seconds_are_within_the_budgets(selection: str) -> None:
    budgets = Budgets.of(selection)
    recorded = budgets.recorded_per_package()
    over = {
        package: f"{seconds:.1f} of {budgets.packages[package]} s"
        for package, seconds in recorded.items()
        if seconds > budgets.packages[package]
    }
    assert not over, "make these tests cheaper, then `make durations`; the nine minutes are shared"


def test_every_test_file_was_measured() -> None:
    measured = {*Budgets.of("test").files, *Budgets.of("test-all").files}
    root = TESTS.parent
    files = {str(path.relative_to(root)) for path in TESTS.rglob("test_*.py")}
    gpu = {file for file in files if "/test_gpu" in file}
    assert not files - measured - gpu, "run `make durations`, or add their CPU seconds"


def test_budgets_of_make_test_add_up_to_nine_minutes() -> None:
    assert sum(Budgets.of("test").packages.values()) <= 540
