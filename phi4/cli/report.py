"""`phi4 report`: one run or several as an HTML page."""

from pathlib import Path
from typing import Annotated

import typer

from phi4.data.files.atomic_files import file_error
from phi4.errors import DataError
from phi4.track.report import write_report


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories (run.dir).")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="File to write; by default report.html in the run's directory, or in the current "
            "directory for several runs."
        ),
    ] = None,
    mlflow: Annotated[
        bool, typer.Option("--mlflow", help="Also upload the page as an artifact of each run.")
    ] = False,
) -> None:
    """Write an HTML report of one run or of several side by side; it works without a network.

    It shows loss, learning rate, gradient norm and throughput; where the wall time went; attempts,
    loss spikes and the reactions to them, checkpoints; data by source, layout, kernels and the
    recipe. The run may still be running or have been killed.
    """
    path = out or (runs[0] if len(runs) == 1 else Path()) / "report.html"
    if path.is_dir():
        raise DataError(f"--out={path} is a directory; name a file, for example report.html")
    try:
        write_report(runs, path)
    except OSError as error:
        raise file_error(error) from error
    size = path.stat().st_size / 2**20
    typer.echo(f"{path} ({size:.1f} MB); open it in a browser")
    if mlflow:
        from phi4.track.mlflow import send_file

        for run in runs:
            send_file(run, path, typer.echo)
