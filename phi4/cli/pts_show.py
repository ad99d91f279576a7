"""`phi4 pts show`: a trajectory of a search, coloured by the chance of a right answer."""

from pathlib import Path
from typing import Annotated

import typer

from phi4.errors import DataError
from phi4.pts.search.rows import TRAJECTORIES_NAME, read_trajectories

Directory = Annotated[
    Path, typer.Argument(metavar="DIR", help="Directory that `phi4 pts search --out` wrote.")
]
Number = Annotated[
    int,
    typer.Option(
        "--trajectory", min=0, help="Index of the trajectory in trajectories.jsonl, from 0."
    ),
]
Png = Annotated[Path | None, typer.Option(help="Also write a PNG picture to this file.")]


def register(app: typer.Typer) -> None:
    """Add the command to `phi4 pts`."""
    app.command("show")(show)


def show(directory: Directory, trajectory: Number = 0, png: Png = None) -> None:
    """Print a trajectory, its tokens coloured by p, the probability of a correct answer.

    Red is p near 0, blue is p near 1, grey is unknown. A pivot is underlined and followed by the
    change of p measured at its confirmation, which overestimates the true change. Below the text, a
    table lists where p was measured, with how many completions, and why.
    """
    # Importing it costs what a command without colours need not pay.
    from rich.console import Console

    from phi4.pts.search.show import draw_trajectory, measured_lines, trajectory_text

    rows = list(read_trajectories(directory / TRAJECTORIES_NAME))
    if trajectory >= len(rows):
        has = f"has {len(rows)}; count from 0" if rows else "has none, for it kept no question"
        raise DataError(f"--trajectory={trajectory}, but {directory} {has}")
    row = rows[trajectory]
    console = Console(soft_wrap=True, highlight=False)
    verdict = "right" if row.is_right else "wrong"
    console.print(f"{row.trajectory} ({trajectory} of {len(rows)}): {verdict}", markup=False)
    if row.prompt:
        console.print(row.prompt, markup=False, style="dim")
    console.print(trajectory_text(row))
    for line in measured_lines(row):
        console.print(line, markup=False)
    if png is not None:
        typer.echo(f"picture: {draw_trajectory(row, png)}")
