"""`phi4 sweep`: a grid of small runs, and what it shows."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from phi4.cli import launch_options as options
from phi4.cli.file_errors import FileErrorsGroup
from phi4.cli.slurm_request import asked_request, require_notice_in_time
from phi4.cli.sweep_analyses import analysis_of
from phi4.cli.tables import table_console
from phi4.config import Recipe
from phi4.errors import ConfigError
from phi4.launch import slurm as on_slurm
from phi4.launch.sweep import (
    Analysis,
    SweepFile,
    SweepRun,
    array_request,
    load_sweep,
    progress_of,
    require_inputs,
    results_of,
    run_here,
    runs_of,
    stop_seconds_of,
)
from phi4.rundir import held_lease
from phi4.stages import require_stage, stage_of

app = typer.Typer(cls=FileErrorsGroup, no_args_is_help=True)

File = Annotated[Path, typer.Argument(help="A sweep file, like those in examples/sweeps/.")]
_OWN_OPTIONS = ("file", "jobs", "slurm")


@app.command()
def run(
    context: typer.Context,
    file: File,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Concurrent runs; by default parallel_runs of the file."),
    ] = None,
    slurm: Annotated[
        bool,
        typer.Option(
            "--slurm", help="Submit one job array with a task per run; uses the options below."
        ),
    ] = False,
    nodes: options.Nodes = "1",
    partition: options.Partition = None,
    account: options.Account = None,
    time: options.TimeLimit = None,
    gpus_per_node: options.GpusPerNode = 8,
    tasks_per_node: options.TasksPerNode = None,
    cpus_per_task: options.CpusPerTask = None,
    torchrun: options.UseTorchrun = False,
    signal_seconds: options.SignalSeconds = None,
    container: options.Container = None,
    container_mounts: options.Mounts = None,
    setup: options.Setup = None,
    max_requeues: options.MaxRequeues = 3,
    sbatch: options.SbatchOptions = None,
    python: options.Python = None,
    dry_run: options.DryRun = False,
) -> None:
    """Train every run of a sweep that has not ended, on this machine or on Slurm.

    All runs are checked before the first one starts. A run that fails does not stop the others. The
    same command resumes a sweep: finished and diverged runs are skipped. Remove a run's directory
    to train it again.

    On this machine, runs are `phi4 train` processes, --jobs at a time. Ctrl-C ends them all;
    SIGTERM lets them save first. Exit codes: 0 all runs ended (diverged ones included), 1 a run
    failed, 2 wrong input, 3 another `phi4 sweep run` owns the sweep, 5 stopped by SIGTERM, 130 by
    Ctrl-C.

    With --slurm the tasks of the array requeue themselves like jobs of `phi4 launch slurm`, and the
    other commands of `phi4 launch` accept every run's directory.
    """
    _require_no_slurm_options(context, slurm)
    sweep = load_sweep(file)
    runs = runs_of(sweep, str(file), _stage_violations)
    request = _slurm_request(sweep, runs, context.params) if slurm else None
    if request and dry_run:
        waiting = _to_do(sweep, runs)
        if waiting:
            typer.echo(on_slurm.script_text(array_request(request, waiting)), nl=False)
        return
    require_inputs(runs)
    with held_lease(Path(sweep.directory), job="", say=typer.echo):
        waiting = _to_do(sweep, runs)
        if not waiting:
            return
        if request:
            _submit(array_request(request, waiting), waiting, sweep)
            return
        directory, num_jobs = Path(sweep.directory), jobs or sweep.parallel_runs
        code = run_here(waiting, directory, jobs=num_jobs, say=typer.echo)
    typer.echo(f"`phi4 sweep status {file}` shows the runs, `phi4 sweep table {file}` the results")
    raise typer.Exit(code)


def _slurm_request(
    sweep: SweepFile, runs: list[SweepRun], given: Mapping[str, Any]
) -> on_slurm.SlurmRequest:
    """What is asked of every task; `given` are the options of `run` by name."""
    request = asked_request(
        given,
        run_dir=sweep.directory,
        last_step=0,
        name=sweep.name,
        arguments=("train",),
        stop_seconds=stop_seconds_of(runs),
    )
    return replace(request, parallel_tasks=given["jobs"])


@app.command()
def status(file: File) -> None:
    """Show the state of every run of a sweep."""
    sweep = load_sweep(file)
    runs = runs_of(sweep, str(file))
    progress = progress_of(runs, Path(sweep.directory))
    metric = sweep.metrics[0]
    values = {(r.variant, r.scale, r.seed): r for r in results_of(runs, progress, sweep.metrics)}
    table = Table("run", "state", "step", "exit code", metric, box=SIMPLE_HEAD)
    for one in runs:
        found = progress[one.name]
        result = values.get((one.variant, one.scale, one.seed))
        table.add_row(
            one.name,
            found.status,
            f"{found.step:,} of {one.recipe.run.steps:,}",
            "" if found.exit_code is None else str(found.exit_code),
            "" if result is None else f"{result.metrics[metric]:.4f}",
        )
    table_console(160).print(table)
    states = [progress[one.name].status for one in runs]
    typer.echo(", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states)))


@app.command()
def table(
    file: File,
    analysis: Annotated[
        Analysis | None,
        typer.Option(help="Analysis to show; by default `analysis` of the file."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="PNG file of the plot; by default ANALYSIS.png in the sweep's directory, none "
            "with --json."
        ),
    ] = None,
) -> None:
    """Analyse the ended runs of a sweep, with a plot.

    table: variants as rows, metrics and scales as columns: mean over seeds, difference to the
    baseline with its 95% interval (t; paired by seed if all variants have the same seeds), the best
    in bold.

    ranks: whether scales order the variants alike: Spearman's and Kendall's coefficients with a 95%
    interval over seeds, and the number of random orders that agree as well.

    learning_rate: a parabola through loss over log(rate) for each token budget, its minimum with a
    95% interval, a power law over budgets, and the prediction for predict_tokens. A minimum at the
    edge of the grid is reported and not estimated.
    """
    sweep = load_sweep(file)
    runs = runs_of(sweep, str(file))
    progress = progress_of(runs, Path(sweep.directory))
    results = results_of(runs, progress, sweep.metrics)
    if not results:
        raise ConfigError(f"no run of {file} has ended; start them with `phi4 sweep run {file}`")
    kind = analysis or sweep.analysis
    found = analysis_of(kind, sweep, results, num_missing=len(runs) - len(results))
    if as_json:
        typer.echo(json.dumps(found.numbers, indent=2))
    if as_json and out is None:
        return
    picture = found.draw(out or Path(sweep.directory) / f"{kind}.png")
    if as_json:
        return
    for part in found.shown:
        table_console(160).print(part)
    typer.echo(f"picture: {picture}")


def _to_do(sweep: SweepFile, runs: list[SweepRun]) -> list[SweepRun]:
    """The runs that have not ended, after a line that counts them."""
    progress = progress_of(runs, Path(sweep.directory))
    waiting = [one for one in runs if not progress[one.name].has_ended]
    typer.echo(
        f"{sweep.name}: {len(runs)} runs, {len(runs) - len(waiting)} have ended, "
        f"{len(waiting)} to do",
        err=True,  # --dry-run prints a script
    )
    return waiting


def _submit(request: on_slurm.SlurmRequest, runs: list[SweepRun], sweep: SweepFile) -> None:
    require_notice_in_time(request)
    on_slurm.require_version()
    on_slurm.require_partition(request)
    on_slurm.require_idle_array(sweep.directory)
    array = on_slurm.submit_array(request, [one.recipe for one in runs])
    typer.echo(f"job array {array} trains {len(runs)} runs; `squeue -j {array}` shows its tasks")


def _require_no_slurm_options(context: typer.Context, slurm: bool) -> None:
    """Refuse options that would silently do nothing."""
    if slurm:
        return
    for name in context.params:
        source = context.get_parameter_source(name)
        if name not in _OWN_OPTIONS and source is not None and source.name == "COMMANDLINE":
            raise ConfigError(
                f"--{name.replace('_', '-')} has no effect without --slurm; add it, or leave the "
                "option out"
            )


def _stage_violations(recipe: Recipe) -> list[str]:
    require_stage(recipe)
    return list(stage_of(recipe).violations(recipe))
