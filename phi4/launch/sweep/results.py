"""Collect the metrics of the runs that ended."""

import math
from collections.abc import Mapping, Sequence

from phi4.launch.sweep.progress import RunProgress
from phi4.launch.sweep.runs import SweepRun
from phi4.track.sweep.results import Result, metrics_of


def results_of(
    runs: Sequence[SweepRun], progress: Mapping[str, RunProgress], metrics: Sequence[str]
) -> list[Result]:
    """Return the metrics of finished runs, and NaN for diverged ones; others are omitted.

    Raises:
        DataError: a finished run has no value for a metric.
    """
    return [
        Result(
            run.variant,
            run.scale,
            run.seed,
            run.tokens,
            run.values,
            metrics_of(run.run_dir, metrics)
            if progress[run.name].status == "finished"
            else dict.fromkeys(metrics, math.nan),
        )
        for run in runs
        if progress[run.name].has_ended
    ]
