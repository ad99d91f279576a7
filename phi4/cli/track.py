"""`phi4 track`: MLflow made to say what the run directories say."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from phi4.cli.track_compare import register
from phi4.errors import DataError, Phi4Error
from phi4.rundir.names import ATTEMPTS_DIR
from phi4.track.mlflow import replay, settle

app = typer.Typer(help="Runs compared, and what MLflow shows of them.", no_args_is_help=True)
register(app)

RUNS_DIR = Path("runs")

Run = Annotated[Path, typer.Argument(help="Directory of a run.")]
Runs = Annotated[
    list[Path] | None,
    typer.Argument(
        help="Directories of runs; all below `runs/` that are not training where not given."
    ),
]
Uri = Annotated[
    str | None,
    typer.Option(help="Another tracking server or store than the one that shows the run."),
]
Experiment = Annotated[
    str | None, typer.Option(help="Its experiment, where the run is not in the server yet.")
]


@app.callback()
def _group() -> None:
    """Runs compared, and what MLflow shows of them."""


@app.command("replay")
def replay_command(run: Run, uri: Uri = None, experiment: Experiment = None) -> None:
    """Send what a tracking server lacks of a run; again does no harm.

    The run may have trained without MLflow, or with another server. A run that has ended gets its
    true status too; a run that is still training can be sent to another server than its own.
    """
    replay(run, typer.echo, uri=uri, experiment=experiment)


@app.command("settle")
def settle_command(runs: Runs = None) -> None:
    """Give runs that were killed their true status, and what of their points is missing.

    As the newest attempt wrote down that it ended; where it was killed before it could, FINISHED if
    the record has all steps, else FAILED. Tags say how every attempt ended. A run that
    is still training is left as it is.
    """
    failed: list[Phi4Error] = []
    for run in runs or _found(RUNS_DIR):
        try:
            settle(run, typer.echo)
        except Phi4Error as error:
            typer.echo(f"{run}: {type(error).__name__}: {error}", err=True)
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
