"""What holds for every test: our warnings are errors, skips are listed, runs repeat exactly."""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

# Before torch and mlflow are imported: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# A developer's own server is nothing for runs of tests.
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ.pop("MLFLOW_EXPERIMENT_NAME", None)
os.environ.pop("MLFLOW_RUN_ID", None)

import hypothesis
import pytest

from tests.architecture.sizes import ROOT, largest
from tests.support.cpu_seconds import Budgets, CpuMeter, CpuReport, LongestFirst, WriteMeasured
from tests.support.rank_process import OUR_MODULES
from tests.support.skips import StrictSkips, read_skip_list

# Until the tests are collected: imports make no garbage worth a collection, and collections take a
# sixth of their time.
gc.disable()

# Neither deadline nor too_slow: the machine is shared. Derandomised: a red run is red again.
hypothesis.settings.register_profile(
    "phi4",
    deadline=None,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.function_scoped_fixture,
    ],
    derandomize=True,
    database=None,
)
hypothesis.settings.load_profile("phi4")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options that the Makefile gives."""
    parser.addoption(
        "--cpu-budgets",
        metavar="SELECTION",
        help="CPU seconds per package against tests/cpu_budgets.toml, expensive files first",
    )
    parser.addoption(
        "--write-cpu-seconds",
        action="store_true",
        help="with --cpu-budgets: record the CPU seconds per file in tests/cpu_seconds.json",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the plugins of tests/support."""
    # A shell starts what it runs in the background with SIGINT ignored, and so would every process
    # of a test be. Workers of pytest-xdist run this in the main thread, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("filterwarnings", f"error:::{OUR_MODULES}")
    strict = os.environ.get("PHI4_STRICT_SKIPS") == "1"
    if strict:
        allowed = read_skip_list(Path(__file__).parent / "skips.txt")
        config.pluginmanager.register(StrictSkips(allowed))
    if selection := config.getoption("--cpu-budgets"):
        _count_cpu_seconds(config, selection, strict)


def _count_cpu_seconds(config: pytest.Config, selection: str, strict: bool) -> None:
    budgets = Budgets.of(selection)
    plugins: list[object] = [CpuMeter(), LongestFirst(budgets)]
    if not hasattr(config, "workerinput"):
        report = CpuReport(budgets, strict)
        plugins.append(report)
        if config.getoption("--write-cpu-seconds"):
            plugins.append(WriteMeasured(report, selection))
    for plugin in plugins:
        config.pluginmanager.register(plugin)


@pytest.fixture(scope="module", autouse=True)
def no_groups_left() -> Iterator[None]:
    """Megatron-core's groups are of the process: a file that leaves them breaks a later one."""
    yield
    state = sys.modules.get("megatron.core.parallel_state")
    assert state is None or not state.model_parallel_is_initialized()


def pytest_collection_finish() -> None:
    """What is imported stays: collections need not walk it again."""
    gc.enable()
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What asks to be split next."""
    if terminalreporter.config.getoption("--cpu-budgets"):
        terminalreporter.section("largest files and functions, in lines")
        terminalreporter.write_line(largest(ROOT))
