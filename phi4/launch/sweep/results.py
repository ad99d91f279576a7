"""The results of the runs that ended."""

import math
from collections.abc import Mapping, Sequence

from phi4.launch.sweep.progress import RunProgress
from phi4.launch.sweep.runs import SweepRun
from phi4.track.sweep.results import Result, metrics_of


def results_of(
    runs: Sequence[SweepRun], progress: Mapping[str, RunProgress], metrics: Sequence[str]
) -> list[Result]:
    """Of finished runs what they measured, of diverged ones NaN; the others are left out.

    Raises:
        DataError: a finished run did not measure a metric.
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
