"""Sweeps: grids of small runs, executed on this machine or as a Slurm job array."""

from phi4.launch.sweep.array import array_request, stop_seconds_of
from phi4.launch.sweep.file import Analysis, SweepFile, load_sweep
from phi4.launch.sweep.inputs import require_inputs
from phi4.launch.sweep.pool import run_here
from phi4.launch.sweep.progress import RunProgress, progress_of
from phi4.launch.sweep.results import results_of
from phi4.launch.sweep.runs import SweepRun, runs_of

__all__ = [
    "Analysis",
    "RunProgress",
    "SweepFile",
    "SweepRun",
    "array_request",
    "load_sweep",
    "progress_of",
    "require_inputs",
    "results_of",
    "run_here",
    "runs_of",
    "stop_seconds_of",
]
