"""`phi4 launch`: a run on a Slurm cluster, or on this machine."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from phi4.cli import launch_options as options
from phi4.cli.file_errors import FileErrorsGroup
from phi4.cli.launch_preflight import preflight
from phi4.cli.slurm_request import asked_request, require_notice_in_time
from phi4.cli.tables import table_console
from phi4.cli.train import Overrides, RecipePath, train
from phi4.config import Recipe, load_recipe
from phi4.errors import ConfigError
from phi4.launch import slurm as on_slurm
from phi4.stages import require_stage, stage_of

app = typer.Typer(cls=FileErrorsGroup, no_args_is_help=True)
app.command("local", short_help="The same as `phi4 train`: all ranks on this machine.")(train)
app.command()(preflight)

_LOG_LINES = 30


@app.command()
def slurm(
    context: typer.Context,
    recipe_path: RecipePath,
    overrides: Overrides = None,
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
    change: options.Change = False,
    dry_run: options.DryRun = False,
) -> None:
    """Write an sbatch script that trains a recipe to its last step, and submit it.

    The script requeues the job after a saved stop, a lost node or a hung rank; after any other
    failure it ends with the code of docs/faults.md. The job is never COMPLETED before run.steps.
    The recipe is copied at submission; a later `phi4 launch slurm` reports differences.
    """
    recipe = load_recipe(recipe_path, overrides or [])
    run_dir = recipe.run.dir
    submitted = str(on_slurm.submitted_recipe_path(run_dir))
    request = asked_request(
        context.params,
        run_dir=run_dir,
        last_step=recipe.run.steps,
        name=recipe.run.name or Path(run_dir).name,
        arguments=("train", submitted, *(["--change"] if change else [])),
        stop_seconds=recipe.reliability.stop_seconds,
    )
    settings = on_slurm.rank_settings(recipe, on_gpus=gpus_per_node > 0)
    request = replace(request, settings=settings)
    _require_sound(recipe, request)
    if dry_run:
        typer.echo(on_slurm.script_text(request), nl=False)
        return
    on_slurm.require_version()
    on_slurm.require_partition(request)
    on_slurm.require_idle(run_dir)
    on_slurm.require_same_run(run_dir, recipe, allow=change, say=typer.echo)
    job = on_slurm.submit(request, recipe)
    typer.echo(f"job {job} trains {run_dir} on {nodes} nodes; `phi4 launch status {run_dir}`")


def _require_sound(recipe: Recipe, request: on_slurm.SlurmRequest) -> None:
    require_stage(recipe)
    if request.signal_seconds and request.signal_seconds < recipe.reliability.stop_seconds:
        raise ConfigError(
            f"--signal-seconds={request.signal_seconds} is less than reliability.stop_seconds="
            f"{recipe.reliability.stop_seconds:g}, so Slurm may kill a run that is still saving; "
            "raise the one or lower the other"
        )
    require_notice_in_time(request)
    rules = list(stage_of(recipe).violations(recipe))
    on_slurm.require_fit(recipe, request.nodes, request.tasks_per_node, rules)


@app.command()
def status(
    run_dirs: Annotated[list[Path], typer.Argument(help="Run directories (run.dir).")],
) -> None:
    """Show the state of the newest job of each run."""
    table = Table(
        "run", "job", "state", "attempts", "step", "nodes", "exit", "reason", box=SIMPLE_HEAD
    )
    for run_dir in run_dirs:
        found = on_slurm.status(run_dir)
        job = found.job
        table.add_row(
            str(run_dir),
            found.submission.job,
            "unknown to Slurm" if job is None else job.state,
            str(found.attempts),
            f"{found.step:,} of {found.submission.steps:,}",
            "" if job is None or job.nodes == "(null)" else job.nodes,
            "" if job is None else job.exit_code,
            "" if job is None or job.reason == "None" else job.reason,
        )
    _print(table)


@app.command()
def history(run_dir: options.RunDir) -> None:
    """List every attempt of every job of a run: start step, end step, reason of the end."""
    on_slurm.newest(run_dir)  # refuses a directory that no job was submitted for
    table = Table(
        "job",
        "attempt",
        "started",
        "ended",
        "steps",
        "nodes",
        "code",
        "then",
        "why",
        box=SIMPLE_HEAD,
    )
    for attempt in on_slurm.attempts(run_dir):
        start, end = attempt.start, attempt.end
        table.add_row(
            start.job,
            str(start.attempt),
            start.time,
            end.time if end else "not recorded",
            f"{start.step:,} to {end.step:,}" if end else f"{start.step:,} to ?",
            start.nodes,
            str(end.code) if end else "",
            end.then if end else "",
            end.why if end else "",
        )
    _print(table)


@app.command()
def cancel(
    run_dir: options.RunDir,
    save: Annotated[
        bool, typer.Option("--save", help="Let a running job save a checkpoint first.")
    ] = False,
) -> None:
    """Cancel the newest job of a run; it is not requeued."""
    typer.echo(on_slurm.cancel(run_dir, save=save))


@app.command()
def logs(
    run_dir: options.RunDir,
    rank: Annotated[int, typer.Option(min=0, help="Rank whose output is shown.")] = 0,
    lines: Annotated[
        int, typer.Option(min=1, help="Lines from the end of each file.")
    ] = _LOG_LINES,
) -> None:
    """Print the end of the newest job's script output and of one rank's output."""
    for path in on_slurm.log_paths(run_dir, rank):
        typer.echo(f"==> {path}")
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]:
            typer.echo(line)


def _print(table: Table) -> None:
    table_console(160).print(table)
