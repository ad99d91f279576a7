"""What holds for every test: our warnings are errors, skips are listed, runs repeat exactly."""

import os
from pathlib import Path

# Before torch and mlflow are imported: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import hypothesis
import pytest

from tests.architecture.sizes import ROOT, largest
from tests.support.rank_process import OUR_MODULES
from tests.support.rooms import RoomSeconds
from tests.support.skips import StrictSkips, read_skip_list

# No deadline: the machine is shared. Derandomised: a red run is red again.
hypothesis.settings.register_profile("phi4", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("phi4")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option that `make test` gives."""
    parser.addoption("--room-budgets", action="store_true", help="seconds per room, largest code")


def pytest_configure(config: pytest.Config) -> None:
    """Register the plugins of tests/support."""
    config.addinivalue_line("filterwarnings", f"error:::{OUR_MODULES}")
    strict = os.environ.get("PHI4_STRICT_SKIPS") == "1"
    if strict:
        allowed = read_skip_list(Path(__file__).parent / "skips.txt")
        config.pluginmanager.register(StrictSkips(allowed))
    if config.getoption("--room-budgets") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(RoomSeconds(strict))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What asks to be split next."""
    if terminalreporter.config.getoption("--room-budgets"):
        terminalreporter.section("largest files and functions, in lines")
        terminalreporter.write_line(largest(ROOT))
