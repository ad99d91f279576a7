"""Start a run's workers, and identify the launcher of this process. Imports no torch."""

from phi4.launch.environment import (
    Starter,
    WorkerEnvironment,
    expand_nodelist,
    launched_by,
    started_by,
    worker_environment,
)
from phi4.launch.local import run_workers
from phi4.launch.notices import StopPlan, hold_notices, save_and_end, take_notices
from phi4.launch.ranks import join, on_ranks
from phi4.launch.worker import ErrorReport, StoppedError, report_errors

__all__ = [
    "ErrorReport",
    "Starter",
    "StopPlan",
    "StoppedError",
    "WorkerEnvironment",
    "expand_nodelist",
    "hold_notices",
    "join",
    "launched_by",
    "on_ranks",
    "report_errors",
    "run_workers",
    "save_and_end",
    "started_by",
    "take_notices",
    "worker_environment",
]
