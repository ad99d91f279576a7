"""A sweep as one Slurm job array: a task per run, each requeued and ended as a job of its own."""

from collections.abc import Sequence
from dataclasses import replace

from phi4.errors import ConfigError
from phi4.launch.slurm import ArrayTask, SlurmRequest, rank_settings, require_fit
from phi4.launch.sweep.runs import SweepRun


def array_request(request: SlurmRequest, runs: Sequence[SweepRun]) -> SlurmRequest:
    """A request for all runs.

    Args:
        request: what is asked of every task; its run_dir is the sweep's directory.
        runs: that have not ended; what their stages ask is checked before.

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
            f"runs {one} and {other} differ in run.threads, or in that one splits its model over "
            "tensor or context ranks; one job array sets the same environment for all, so make "
            "two sweeps of them"
        )
    if request.signal_seconds and request.signal_seconds < stop_seconds_of(runs):
        raise ConfigError(
            f"--signal-seconds={request.signal_seconds} is less than the runs have to save "
            f"(reliability.stop_seconds up to {stop_seconds_of(runs):g}); give a longer notice"
        )
    return replace(
        request,
        last_step=max(run.recipe.run.steps for run in runs),
        settings=next(iter(settings)),
        tasks=tuple(ArrayTask(run.recipe.run.dir, run.recipe.run.steps) for run in runs),
    )


def stop_seconds_of(runs: Sequence[SweepRun]) -> float:
    """What the slowest run has to save and end after a notice."""
    return max(run.recipe.reliability.stop_seconds for run in runs)
