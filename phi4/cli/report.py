"""`phi4 report`: runs as a page that people look at."""

from pathlib import Path
from typing import Annotated

import typer

from phi4.data.files.atomic_files import file_error
from phi4.track.report import write_report


def report(
    runs: Annotated[list[Path], typer.Argument(help="Directories of runs (run.dir).")],
    out: Annotated[
        Path | None,
        typer.Option(help="The page; report.html in the run's directory, or here for several."),
    ] = None,
    mlflow: Annotated[
        bool, typer.Option("--mlflow", help="Make the page an artifact of each run in MLflow, too.")
    ] = False,
) -> None:
    """Write a run, or several side by side, as one HTML page that works without a network.

    Loss, learning rate, gradient norm and throughput; where the wall time went; attempts, spikes
    and what was done about them, checkpoints; data by source, layout, kernels and the recipe. The
    run may still be running, or have been killed.
    """
    path = out or (runs[0] if len(runs) == 1 else Path()) / "report.html"
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
