"""A sweep as one Slurm job array: one task per run, each requeued and ended individually."""

from collections.abc import Sequence
from dataclasses import replace

from phi4.errors import ConfigError
from phi4.launch.slurm import ArrayTask, SlurmRequest, rank_settings, require_fit
from phi4.launch.sweep.runs import SweepRun


def array_request(request: SlurmRequest, runs: Sequence[SweepRun]) -> SlurmRequest:
    """Make a request for all runs.

    Args:
        request: the request for every task; its run_dir is the sweep's directory.
        runs: runs that have not ended; the rules of their stages have already been checked.

    Raises:
        LayoutError: a run does not fit the nodes; names it.
        ConfigError: the ranks of the runs need other environment variables; or Slurm's notice
            comes too late for a run to save.
    """
    settings = {}
    for run in runs:
        try:
            require_fit(run.recipe, request.nodes, request.tasks_per_node)
        except ConfigError as error:
            raise type(error)(f"run {run.name}: {error}") from None
        settings[rank_settings(run.recipe, on_gpus=request.gpus_per_node > 0)] = run.name
    if len(settings) > 1:
        one, other = list(settings.values())[:2]
        raise ConfigError(
            f"runs {one} and {other} differ in run.threads, or only one of them uses tensor or "
            f"context parallelism; a job array sets the same environment for all tasks, so split "
            f"the sweep in two"
        )
    if request.signal_seconds and request.signal_seconds < stop_seconds_of(runs):
        raise ConfigError(
            f"--signal-seconds={request.signal_seconds} is shorter than the time that the runs "
            f"have to save (reliability.stop_seconds up to {stop_seconds_of(runs):g}); raise it"
        )
    return replace(
        request,
        last_step=max(run.recipe.run.steps for run in runs),
        settings=next(iter(settings)),
        tasks=tuple(ArrayTask(run.recipe.run.dir, run.recipe.run.steps) for run in runs),
    )


def stop_seconds_of(runs: Sequence[SweepRun]) -> float:
    """Return the longest time that a run has to save and end after a notice."""
    return max(run.recipe.reliability.stop_seconds for run in runs)
