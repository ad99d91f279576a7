"""`phi4 track`: runs compared, and MLflow synchronised with run directories."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from phi4.cli.file_errors import FileErrorsGroup
from phi4.cli.track_compare import register
from phi4.errors import DataError, Phi4Error, error_text
from phi4.rundir.names import ATTEMPTS_DIR
from phi4.track.mlflow import replay, settle

app = typer.Typer(cls=FileErrorsGroup, no_args_is_help=True)
register(app)

RUNS_DIR = Path("runs")

Run = Annotated[Path, typer.Argument(help="Run directory.")]
Runs = Annotated[
    list[Path] | None,
    typer.Argument(help="Run directories; by default all below `runs/` that are not training."),
]
Uri = Annotated[
    str | None,
    typer.Option(help="Tracking server or store, if not the one that the run uses."),
]
Experiment = Annotated[
    str | None, typer.Option(help="Experiment, if the server does not have the run yet.")
]


@app.callback()
def _group() -> None:
    """Make a single command a command of the group."""


@app.command("replay")
def replay_command(run: Run, uri: Uri = None, experiment: Experiment = None) -> None:
    """Send the metrics of a run that a tracking server lacks; repeating it is safe.

    The run may have trained without MLflow or with another server. A run that has ended also gets
    its final status; a run that is still training can only be sent to another server than its own.
    """
    replay(run, typer.echo, uri=uri, experiment=experiment)


@app.command("settle")
def settle_command(runs: Runs = None) -> None:
    """Give runs that were killed their final status in MLflow, and their missing metrics.

    The status is the one that the newest attempt recorded. If it was killed before that, the status
    is FINISHED if the metrics have all steps, else FAILED. Tags describe the end of every attempt.
    A run that is still training is skipped.
    """
    failed: list[Phi4Error] = []
    for run in runs or _found(RUNS_DIR):
        try:
            settle(run, typer.echo)
        except Phi4Error as error:
            typer.echo(error_text(type(error).__name__, f"{run}: {error}"), err=True)
            failed.append(error)
    if failed and runs:
        raise typer.Exit(max(error.exit_code for error in failed))


def _found(root: Path) -> Sequence[Path]:
    """Directories of runs below a directory.

    Raises:
        DataError: there are none.
    """
    found = sorted(path.parent for path in _attempts(root))
    if not found:
        raise DataError(f"{root}/ has no run directory; give the directories of runs")
    return found


def _attempts(root: Path) -> Iterator[Path]:
    return (path for path in root.glob(f"**/{ATTEMPTS_DIR}") if path.is_dir())
